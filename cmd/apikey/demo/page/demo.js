// What the page does: it draws what the stream of events tells, and sends what buttons say.

const $ = (selector, from = document) => from.querySelector(selector);
const all = (selector, from = document) => [...from.querySelectorAll(selector)];

// element makes an element with attributes and children.
function element(name, attributes = {}, ...children) {
	const made = document.createElement(name);
	for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
	made.append(...children);
	return made;
}

const nameOf = (code) => code || "admitted";
const statusOf = (code) => (code === "" ? "200" : code === "SERVICE_UNAVAILABLE" ? "503 " + code : "401 " + code);
const coded = (code) => element("span", { class: "code-" + nameOf(code) }, statusOf(code));

// put replaces the children of an element, unless they look the same already.
function put(parent, key, ...children) {
	if (parent.dataset.key === key) return;
	parent.dataset.key = key;
	parent.replaceChildren(...children);
}

async function post(path, values) {
	const response = await fetch(path, { method: "POST", body: new URLSearchParams(values) });
	$("#error").textContent = response.ok ? (await response.json()).error : await response.text();
}

// The strips.

const strips = [];
const barWidth = 3;

function addReplica(index, name) {
	const row = element("div", { class: "replica" },
		element("div", {}, element("strong", {}, "Replica " + name), element("span", { class: "feed" })),
		element("canvas", { role: "img", "aria-label": "Answers of replica " + name }),
		element("div", { class: "answer" }),
		element("button", { title: "Start it anew, with an empty memory", "aria-label": "Restart replica " + name }, "Restart"));
	$("button", row).addEventListener("click", () => post("demo/restart", { replica: index }));
	$("#replicas").append(row);
	strips[index] = { row, samples: [], shown: 0 };
}

const heights = { memory: 0.4, redis: 0.6, store: 0.8, stale: 1 };

function draw(strip) {
	const canvas = $("canvas", strip.row);
	const scale = devicePixelRatio || 1;
	const width = (canvas.width = canvas.clientWidth * scale);
	const height = (canvas.height = canvas.clientHeight * scale);
	const context = canvas.getContext("2d");
	const colors = getComputedStyle(document.documentElement);
	const color = {
		"": "--admitted", INVALID_API_KEY: "--invalid", PLAN_EXPIRED: "--expired", SERVICE_UNAVAILABLE: "--unavailable",
	};
	const fit = Math.floor(width / (barWidth * scale));
	strip.samples = strip.samples.slice(-fit);
	strip.samples.forEach((sample, i) => {
		const x = width - (strip.samples.length - i) * barWidth * scale;
		const tall = (heights[sample.source] ?? 1) * height;
		context.fillStyle = colors.getPropertyValue(color[sample.code] ?? "--line");
		context.fillRect(x, height - tall, (barWidth - 1) * scale, tall);
	});
}

function duration(micros) {
	return micros < 1000 ? micros.toFixed(1) + " µs" : (micros / 1000).toFixed(1) + " ms";
}

function showReplica(replica, index, setting) {
	if (!strips[index]) addReplica(index, replica.name);
	const strip = strips[index];
	strip.samples.push(...replica.samples);
	const last = strip.samples.at(-1);
	if (last) $(".answer", strip.row).replaceChildren(coded(last.code), ` from ${last.source || "nowhere"}, ${duration(last.micros)}`);
	const feed = !setting.realFeed ? "no announcements" : replica.live ? "hears of changes" : "hears of nothing";
	if ($(".feed", strip.row).textContent !== feed) $(".feed", strip.row).textContent = feed;
	$(".feed", strip.row).title = replica.fault;
	draw(strip);
}

// The tables.

// Rows stay, so that a click or the focus on one is not lost; their cells change.
function showRows(rows) {
	for (const row of rows) {
		if (!$("#row-" + row.n)) {
			const radio = element("input", { type: "radio", name: "row", id: "row-" + row.n, "data-row": row.n });
			radio.addEventListener("change", () => post("demo/choose", { row: row.n }));
			$("#rows tbody").append(element("tr", {},
				element("td", {}, radio, element("label", { for: "row-" + row.n }, ` ${row.org}: ${row.about}`)),
				element("td"), element("td"), element("td")));
		}
		const radio = $("#row-" + row.n);
		if (row.chosen) radio.checked = true;
		const [, key, plan, answer] = radio.closest("tr").children;
		put(key, row.keyState, row.keyState);
		put(plan, row.planState, row.planState);
		put(answer, "code " + row.code, coded(row.code));
	}
}

function showChanges(changes) {
	put($("#log tbody"), JSON.stringify(changes), ...changes.map((change, i) =>
		element("tr", {}, element("td", {}, change.what), element("td", {}, coded(change.want)),
			...change.millis.map((ms) => element("td", {}, ms === null ? (i === 0 && !change.same ? "…" : "–") : ms.toFixed(1))))));
	const last = changes[0];
	if (!last) return;
	let text = `${last.what}: waiting for ${statusOf(last.want)}`;
	if (last.same) text = `${last.what}: the answer stays ${statusOf(last.want)}`;
	else if (last.millis.every((ms) => ms !== null)) {
		text = `${last.what}: all three replicas answer ${statusOf(last.want)} after ${Math.max(...last.millis).toFixed(1)} ms`;
	}
	if ($("#effect").textContent !== text) $("#effect").textContent = text;
	$("#effect").dataset.change = last.n;
}

function showLinks(links, setting) {
	for (const [part, state] of Object.entries(links)) {
		for (const button of all(`[data-part="${part}"] button`)) {
			button.setAttribute("aria-pressed", String(button.dataset.state === state));
			button.disabled = part === "announcements" && !setting.realFeed;
		}
	}
}

function showStats(replicas) {
	const names = Object.keys(replicas[0].counts);
	put($("#stats tbody"), JSON.stringify(replicas.map((r) => r.counts)), ...names.map((name) =>
		element("tr", {}, element("th", { scope: "row" }, name), ...replicas.map((r) => element("td", {}, String(r.counts[name]))))));
}

function showSetting(setting) {
	$("#setting").textContent = `Keys and plans are in ${setting.store}. Redis ${setting.redis}. ` +
		(setting.realFeed ? "Changes are announced by its triggers. " : "Nothing announces changes. ") +
		(setting.loopback ? `It listens on ${setting.listening}, for this machine only.` : `It listens on ${setting.listening}, for the whole network.`);
	$("#simulated").hidden = !setting.simulated;
	$("#simulated ul").replaceChildren(...(setting.simulated ?? []).map((text) => element("li", {}, text)));
	$("#bound").textContent = `Without announcements a change takes effect within ${setting.maxStaleness / 1e9} s (MaxStaleness).`;
	$("#psql").hidden = !setting.psql;
	$("#psql code").textContent = setting.psql;
}

// What the customer sees.

let madeUp = "";
let rows = [];
let request = { path: "v1/whoami", header: null };

function requestFor(kind) {
	const chosen = rows.find((row) => row.chosen)?.key;
	const unpaid = rows.find((row) => row.code === "PLAN_EXPIRED")?.key;
	switch (kind) {
	case "AUTHORIZATION_HEADER_MISSING": return { path: "v1/whoami", header: null };
	case "INVALID_API_KEY_SCHEMA": return { path: "v1/whoami", header: "Token " + chosen };
	case "API_KEY_MISSING": return { path: "v1/whoami", header: "Bearer " };
	case "INVALID_API_KEY": return { path: "v1/whoami", header: "Bearer " + madeUp };
	case "PLAN_EXPIRED": return { path: "v1/whoami", header: "Bearer " + (unpaid ?? chosen) };
	case "SERVICE_UNAVAILABLE": return { path: "outage/v1/whoami", header: "Bearer " + chosen };
	}
	return { path: "v1/whoami", header: "Bearer " + chosen };
}

async function send(kind) {
	request = requestFor(kind);
	showCode();
	const headers = request.header === null ? {} : { Authorization: request.header };
	const response = await fetch(request.path, { headers });
	const lines = [`HTTP/1.1 ${response.status} ${response.statusText}`];
	for (const [name, value] of response.headers) lines.push(`${name}: ${value}`);
	const body = await response.text();
	$("#response").textContent = lines.join("\n") + "\n\n" + JSON.stringify(JSON.parse(body), null, 2) +
		(kind === "SERVICE_UNAVAILABLE" ? "\n\n/outage/ is a middleware whose store is always away." : "");
}

function showCode() {
	const url = new URL(request.path, location.href).href;
	const header = request.header;
	const code = {
		curl: header === null ? `curl -i ${url}` : `curl -i -H 'Authorization: ${header}' ${url}`,
		fetch: `const response = await fetch("${url}"${header === null ? "" : `, {\n  headers: { Authorization: "${header}" },\n}`});
const body = await response.json();
if (!body.success) throw new Error(body.error.code);`,
		Go: `req, err := http.NewRequestWithContext(ctx, http.MethodGet, "${url}", nil)
if err != nil {
	return err
}
${header === null ? "" : `req.Header.Set("Authorization", "${header}")\n`}resp, err := http.DefaultClient.Do(req)
if err != nil {
	return err
}
defer resp.Body.Close()
return apikeyclient.FromResponse(resp) // github.com/trackpilots/apikey/apikeyclient`,
		Python: `import json, urllib.error, urllib.request

request = urllib.request.Request("${url}"${header === null ? "" : `,\n    headers={"Authorization": "${header}"}`})
try:
    print(json.load(urllib.request.urlopen(request)))
except urllib.error.HTTPError as e:
    print(e.code, json.load(e)["error"]["code"])`,
	};
	$("#code").textContent = code[$('input[name="language"]:checked').value];
}

// Everything together.

for (const button of all("[data-change]")) button.addEventListener("click", () => post("demo/change", { action: button.dataset.change }));
for (const button of all("[data-part] button")) {
	button.addEventListener("click", () => post("demo/fault", { part: button.closest("fieldset").dataset.part, state: button.dataset.state }));
}
for (const button of all("[data-request]")) button.addEventListener("click", () => send(button.dataset.request));
for (const radio of all('input[name="language"]')) radio.addEventListener("change", showCode);
$("#copy").addEventListener("click", async () => {
	await navigator.clipboard.writeText($("#code").textContent);
	$("#copy").textContent = "Copied";
	setTimeout(() => ($("#copy").textContent = "Copy"), 1500);
});

let setting = null;
const events = new EventSource("demo/events");
events.onmessage = (message) => {
	const event = JSON.parse(message.data);
	if (event.setting) {
		setting = event.setting;
		madeUp = event.madeUp;
		$("#replicas").replaceChildren();
		$("#rows tbody").replaceChildren();
		strips.length = 0;
		showSetting(setting);
	}
	rows = event.rows;
	event.replicas.forEach((replica, i) => showReplica(replica, i, setting));
	showRows(rows);
	showChanges(event.changes ?? []);
	showLinks(event.links, setting);
	showStats(event.replicas);
	if ($("#code").textContent === "") {
		request = requestFor("chosen");
		showCode();
	}
};
events.onerror = () => { $("#setting").textContent = "The demo does not answer. Is it still running?"; };
