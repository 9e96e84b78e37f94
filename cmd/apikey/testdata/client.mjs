// Runs the client snippet of the customers' documentation, as it stands there,
// against a server of ours, and prints what it throws.
//
//   node client.mjs DOCUMENTATION URL < [{"authorization": "Bearer KEY"}, {"authorization": null}, ...]
import { readFileSync } from "node:fs";

const [documentation, url] = process.argv.slice(2);
const text = readFileSync(documentation, "utf8");
const start = text.indexOf("const response = await fetch(");
const end = text.indexOf("\n}\n", start) + 3;
const AsyncFunction = (async () => {}).constructor;
const snippet = new AsyncFunction("fetch", text.slice(start, end));

const thrown = [];
for (const { authorization } of JSON.parse(readFileSync(0, "utf8"))) {
  const bearer = authorization?.match(/^Bearer (.*)$/);
  process.env.TRACKPILOTS_API_KEY = bearer?.[1] ?? "";
  try {
    await snippet((_, { headers }) => {
      if (!bearer) headers = authorization === null ? {} : { Authorization: authorization };
      return fetch(url, { headers });
    });
    thrown.push(null);
  } catch (error) {
    thrown.push(error.message);
  }
}
console.log(JSON.stringify(thrown));
