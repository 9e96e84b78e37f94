// Package browsertest tests the page of the demo in a headless Chromium.
package browsertest

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
)

var screenshot = flag.String("screenshot", "", "where TestRevocation leaves a picture of the page; empty: nowhere")

// patience is how long a busy machine may take.
const patience = 60 * time.Second

var binary string // the command

func TestMain(m *testing.M) {
	flag.Parse()
	dir, err := os.MkdirTemp("", "browsertest")
	if err == nil {
		binary = filepath.Join(dir, "apikey")
		build := exec.Command("go", "build", "-o", binary, ".")
		build.Dir = ".."
		var out []byte
		if out, err = build.CombinedOutput(); err != nil {
			err = fmt.Errorf("%w\n%s", err, out)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// A tab is the page of a demo of the test's own.
type tab struct {
	t       *testing.T
	ctx     context.Context
	changes int // that were made
}

// open starts a demo and opens its page. In the end the console must have said nothing.
func open(t *testing.T, args ...string) *tab {
	t.Helper()
	browser := ""
	for _, name := range []string{"chromium", "chromium-headless-shell", "google-chrome"} {
		if path, err := exec.LookPath(name); err == nil {
			browser = path
			break
		}
	}
	if browser == "" {
		t.Fatal("there is no Chromium: 'make servers' installs it")
	}
	url := startDemo(t, args...)
	// Without a sandbox, since CI runs as root. The page is our own.
	options := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(browser), chromedp.NoSandbox, chromedp.WindowSize(1200, 1500))
	allocator, end := chromedp.NewExecAllocator(context.WithoutCancel(t.Context()), options...)
	t.Cleanup(end)
	ctx, shut := chromedp.NewContext(allocator)
	t.Cleanup(shut)
	b := &tab{t: t, ctx: ctx}
	if err := chromedp.Do(ctx); err != nil { // the browser outlives this call
		t.Fatal(err)
	}
	watching, stop := context.WithCancel(ctx)
	messages := chromedp.Console(watching)
	t.Cleanup(func() {
		evaluate[bool](b, `(console.info("the end"), true)`)
		for m, err := range messages {
			switch {
			case err != nil:
				t.Error(err)
			case m.Text == "the end":
			case m.Type == "error" && m.Source == "network" && strings.Contains(m.URL, "/v1/whoami"): // a refusal
				continue
			case m.IsException() || m.Type == "error" || m.Type == "warning":
				t.Errorf("the console says %s (%s)", m, m.URL)
				continue
			default:
				continue
			}
			break
		}
		stop()
	})
	b.do(chromedp.Navigate(url), chromedp.WaitVisible(chromedp.CSS(`.replica:nth-of-type(3)`)))
	return b
}

// startDemo returns the URL of a new demo.
func startDemo(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.Command(binary, append([]string{"demo", "--addr", "localhost:0"}, args...)...)
	cmd.Env = append(os.Environ(), "DATABASE_URL=", "REDIS_URL=")
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(os.Interrupt)
		if err := cmd.Wait(); err != nil {
			t.Errorf("the demo ends with %v", err)
		}
	})
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if m := regexp.MustCompile(`^open (http://\S+) in a browser`).FindStringSubmatch(lines.Text()); m != nil {
			go func() { // so that the demo can go on writing
				for lines.Scan() {
				}
			}()
			return m[1]
		}
	}
	t.Fatal("the demo does not say where it is")
	return ""
}

func (b *tab) do(steps ...chromedp.Action[chromedp.Void]) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, patience)
	defer cancel()
	if err := chromedp.Do(ctx, steps...); err != nil {
		b.t.Fatal(err)
	}
}

// evaluate evaluates an expression of the page.
func evaluate[T any](b *tab, expression string, options ...chromedp.EvaluateOption) T {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, patience)
	defer cancel()
	value, err := chromedp.Run(ctx, chromedp.Evaluate[T](expression, options...))
	if err != nil {
		b.t.Fatal(err)
	}
	return value
}

func (b *tab) click(selector string) { b.t.Helper(); b.do(chromedp.Click(chromedp.CSS(selector))) }

// change makes a change, and waits until the page knows of it.
func (b *tab) change(name string) {
	b.t.Helper()
	b.click(`[data-change="` + name + `"]`)
	b.changes++
	b.waitFor(fmt.Sprintf(`document.querySelector("#effect").dataset.change === "%d"`, b.changes))
}

func (b *tab) breaks(part, state string) {
	b.t.Helper()
	b.click(`[data-part="` + part + `"] [data-state="` + state + `"]`)
	b.waitFor(`document.querySelector('[data-part="` + part + `"] [data-state="` + state + `"]').getAttribute("aria-pressed") === "true"`)
}

// text returns the text of an element.
func (b *tab) text(selector string) string {
	b.t.Helper()
	return evaluate[string](b, `document.querySelector(`+quoted(selector)+`).textContent`)
}

// waitFor waits until an expression of the page is true.
func (b *tab) waitFor(expression string) {
	b.t.Helper()
	_, err := chromedp.Run(b.ctx, chromedp.Poll[chromedp.Void](expression, chromedp.WithPollingInterval(20*time.Millisecond), chromedp.WithPollingTimeout(patience)))
	if err != nil {
		b.t.Fatalf("%v: %s\n%s", err, expression, b.text("main"))
	}
}

// answers waits until all replicas answer what matches a regular expression.
func (b *tab) answers(pattern string) {
	b.t.Helper()
	b.waitFor(`[...document.querySelectorAll(".answer")].every((e) => ` + "/" + pattern + `/.test(e.textContent))`)
}

// effect waits until all replicas answer by the last change, and returns after how many
// milliseconds.
func (b *tab) effect(answer string) string {
	b.t.Helper()
	b.waitFor(`/answer ` + answer + ` after [\d.]+ ms/.test(document.querySelector("#effect").textContent)`)
	return regexp.MustCompile(`after ([\d.]+) ms`).FindStringSubmatch(b.text("#effect"))[1]
}

// TestRevocation: a revocation takes effect on all replicas, and the page says when.
func TestRevocation(t *testing.T) {
	start := time.Now()
	b := open(t)
	b.answers("200 from")
	b.waitFor(`[...document.querySelectorAll(".feed")].every((e) => e.textContent === "hears of changes")`)
	b.change("deactivate")
	ms := b.effect("401 INVALID_API_KEY")
	t.Logf("seen %v after the start of the demo: on three replicas after %s ms", time.Since(start).Round(time.Millisecond), ms)
	b.answers("401 INVALID_API_KEY from memory")
	b.change("activate")
	b.effect("200")
	b.answers("200 from memory")
	if *screenshot != "" {
		b.change("downgrade")
		b.effect("401 PLAN_EXPIRED")
		b.change("renew")
		b.effect("200")
		b.click(`[data-request="PLAN_EXPIRED"]`)
		b.waitFor(`document.querySelector("#response").textContent.includes("PLAN_EXPIRED")`)
		time.Sleep(time.Second) // for some more bars
		b.do(chromedp.EmulateViewport(1200, 900))
		evaluate[bool](b, `(scrollTo(0, 0), true)`)
		time.Sleep(time.Second)
		picture, err := chromedp.Run(b.ctx, chromedp.CaptureScreenshot())
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(*screenshot, picture, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// TestChanges: every button that changes a key or a plan.
func TestChanges(t *testing.T) {
	b := open(t)
	b.answers("200 from")
	for _, c := range []struct{ button, answer string }{
		{"expire", "401 INVALID_API_KEY"}, {"activate", "200"}, {"expire-plan", "401 PLAN_EXPIRED"}, {"renew", "200"}, {"downgrade", "401 PLAN_EXPIRED"},
		{"renew", "200"}, {"tier-loses-api", "401 PLAN_EXPIRED"}, {"tier-gets-api", "200"}, {"rotate", "200"},
	} {
		b.change(c.button)
		t.Logf("%s: %s after %s ms", c.button, c.answer, b.effect(c.answer))
	}
	// The old key ends by itself.
	b.click("#row-1")
	b.answers("401 INVALID_API_KEY")
	b.change("delete")
	b.waitFor(`document.querySelector("#rows tbody tr td:nth-child(2)").textContent === "deleted"`)
	b.click(`[data-change="delete"]`)
	b.waitFor(`document.querySelector("#error").textContent.includes("has been deleted")`)
	b.change("create")
	b.effect("200")
}

// TestOutages: Redis and the database are broken, and mended.
func TestOutages(t *testing.T) {
	b := open(t)
	b.answers("200 from memory")
	b.breaks("redis", "down")
	b.click(`[aria-label="Restart replica C"]`)
	b.answers("200 from memory")
	b.waitFor(`[...document.querySelectorAll("#stats tr")].some((e) => /^RedisErrors/.test(e.textContent) && Number(e.children[3].textContent) > 0)`)
	b.breaks("redis", "working")

	b.breaks("database", "down")
	b.answers("200 from (memory|stale)")
	b.click("#row-7") // which no replica knows
	b.answers("503 SERVICE_UNAVAILABLE")
	b.click("#row-1")
	b.answers("200 from stale")
	b.breaks("database", "working")
	b.answers("200 from memory")
	b.click("#row-7")
	b.answers("401 PLAN_EXPIRED")

	b.click("#row-1")
	b.answers("200 from memory")
	b.breaks("announcements", "lost")
	b.change("deactivate")
	b.effect("401 INVALID_API_KEY") // within MaxStaleness
	b.breaks("announcements", "working")
	b.waitFor(`[...document.querySelectorAll(".feed")].every((e) => e.textContent === "hears of changes")`)
}

// TestAnswers: each answer that a customer can get, by one click, with code to copy.
func TestAnswers(t *testing.T) {
	b := open(t, "--in-memory")
	b.answers("200 from")
	for request, want := range map[string]string{
		"chosen": `"success": true`, "AUTHORIZATION_HEADER_MISSING": "HTTP/1.1 401", "INVALID_API_KEY_SCHEMA": "HTTP/1.1 401", "API_KEY_MISSING": "HTTP/1.1 401",
		"INVALID_API_KEY": "HTTP/1.1 401", "PLAN_EXPIRED": "HTTP/1.1 401", "SERVICE_UNAVAILABLE": "HTTP/1.1 503",
	} {
		b.click(`[data-request="` + request + `"]`)
		code := `"code": "` + request + `"`
		if request == "chosen" {
			code = "HTTP/1.1 200"
		}
		b.waitFor(`document.querySelector("#response").textContent.includes(` + quoted(code) + `)`)
		if got := b.text("#response"); !strings.Contains(got, want) || !strings.Contains(got, "content-type: application/json") {
			t.Errorf("%s: %s", request, got)
		}
		out, err := exec.Command("sh", "-c", strings.Replace(b.text("#code"), "curl -i", "curl -sS", 1)).CombinedOutput()
		if want := request; err != nil || request != "chosen" && !strings.Contains(string(out), want) {
			t.Errorf("%s: the code says %s, %v", request, out, err)
		}
	}
	b.click(`[data-request="INVALID_API_KEY"]`)
	for language, want := range map[string]string{"fetch": "await fetch", "Go": "apikeyclient.FromResponse", "Python": "urllib.request"} {
		b.click(`input[value="` + language + `"]`)
		if got := b.text("#code"); !strings.Contains(got, want) || !strings.Contains(got, "Bearer tpk_test_") {
			t.Errorf("%s: %s", language, got)
		}
	}
	if python, err := exec.LookPath("python3"); err == nil {
		b.click(`input[value="Python"]`)
		if out, err := exec.Command(python, "-c", b.text("#code")).CombinedOutput(); err != nil || !strings.Contains(string(out), "401 INVALID_API_KEY") {
			t.Errorf("the Python code says %s, %v", out, err)
		}
	}
}

// TestInMemory: without PostgreSQL the page says what is simulated, and a revocation takes
// effect all the same.
func TestInMemory(t *testing.T) {
	start := time.Now()
	b := open(t, "--in-memory")
	b.answers("200 from")
	if got := b.text("#setting"); !strings.Contains(got, "in memory") || !strings.Contains(got, "for this machine only") {
		t.Errorf("the page says %q", got)
	}
	b.click("#simulated summary")
	if got := b.text("#simulated"); !strings.Contains(got, "Announcements: there are none") || !strings.Contains(got, "miniredis") {
		t.Errorf("simulated is %q", got)
	}
	b.change("deactivate")
	t.Logf("a revocation is seen %v after the start", time.Since(start).Round(time.Millisecond))
	b.effect("401 INVALID_API_KEY")
	b.waitFor(`[...document.querySelectorAll('[data-part="announcements"] button')].every((e) => e.disabled)`)
	b.breaks("database", "slow")
	b.click("#row-7")
	b.answers("503 SERVICE_UNAVAILABLE")
	b.breaks("database", "working")
	b.answers("401 PLAN_EXPIRED")
}

// TestKeyboard: the page is used without a mouse.
func TestKeyboard(t *testing.T) {
	b := open(t)
	b.answers("200 from")
	focus := func(what string) string { return evaluate[string](b, `document.activeElement.dataset.`+what+` ?? ""`) }
	for range 40 {
		b.do(chromedp.KeyEvent(kb.Tab))
		if focus("change") == "deactivate" {
			break
		}
	}
	b.do(chromedp.KeyEvent(kb.Enter))
	b.changes++
	b.effect("401 INVALID_API_KEY")
	for range 40 {
		b.do(chromedp.KeyEvent(kb.Tab))
		if focus("row") != "" {
			break
		}
	}
	b.do(chromedp.KeyEvent(kb.ArrowDown), chromedp.KeyEvent(kb.ArrowDown), chromedp.KeyEvent(kb.ArrowDown))
	b.answers("401 PLAN_EXPIRED")
	time.Sleep(2 * time.Second) // the table is drawn anew meanwhile
	if got := focus("row"); got != "4" {
		t.Errorf("the focus is on row %q, want 4", got)
	}
}

// TestAccessibility: axe-core has nothing to say, light or dark.
func TestAccessibility(t *testing.T) {
	axe, err := os.ReadFile("node_modules/axe-core/axe.min.js")
	if err != nil {
		t.Fatalf("%v: 'make servers' installs it", err)
	}
	for _, scheme := range []string{"light", "dark"} {
		t.Run(scheme, func(t *testing.T) {
			b := open(t, "--in-memory")
			features := []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}}
			if _, err := chromedp.Call(b.ctx, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: features}); err != nil {
				t.Fatal(err)
			}
			b.answers("200 from")
			b.change("deactivate")
			b.effect("401 INVALID_API_KEY")
			b.change("delete")
			b.click(`[data-change="delete"]`)
			b.waitFor(`document.querySelector("#error").textContent.includes("has been deleted")`)
			b.click("#simulated summary")
			b.click(`[data-request="SERVICE_UNAVAILABLE"]`)
			b.breaks("redis", "slow")
			evaluate[int](b, string(axe)+"; 0")
			result := evaluate[string](b, `axe.run().then((r) => JSON.stringify({
				passes: r.passes.length, violations: r.violations.map((v) => v.id + ": " + v.nodes.map((n) => n.html).join(" "))}))`, chromedp.EvalAwaitPromise)
			var found struct {
				Passes     int
				Violations []string
			}
			if err := json.Unmarshal([]byte(result), &found); err != nil {
				t.Fatal(errors.Join(err, fmt.Errorf("%s", result)))
			}
			if len(found.Violations) > 0 || found.Passes < 15 {
				t.Errorf("%d checks pass; %s", found.Passes, strings.Join(found.Violations, "\n"))
			}
		})
	}
}

// quoted returns s as a string of JavaScript.
func quoted(s string) string {
	b, _ := json.Marshal(s)
	return string(b)
}
