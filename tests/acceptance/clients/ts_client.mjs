// Counter client on the TypeScript SDK: 1.x (`--sdk 1`, the default) or the 2.x client (`--sdk 2`).
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { parseArgs } from "node:util";

const { values: args } = parseArgs({
  options: {
    url: { type: "string" },
    packages: { type: "string" }, // a node_modules folder
    sessions: { type: "string", default: "20" },
    calls: { type: "string", default: "50" },
    tag: { type: "string", default: "ts" },
    out: { type: "string" },
    sdk: { type: "string", default: "1" },
  },
});

const require = createRequire(join(args.packages, "any.js"));
const name = args.sdk === "2" ? "@modelcontextprotocol/client" : "@modelcontextprotocol/sdk";

function load() {
  if (args.sdk === "2") return require("@modelcontextprotocol/client");
  const { Client } = require("@modelcontextprotocol/sdk/client/index.js");
  const { StreamableHTTPClientTransport } = require("@modelcontextprotocol/sdk/client/streamableHttp.js");
  return { Client, StreamableHTTPClientTransport };
}

function version() {
  return JSON.parse(readFileSync(join(args.packages, name, "package.json"), "utf8")).version;
}

// What was wrong; the n-th call of a session returns n.
async function count({ Client, StreamableHTTPClientTransport }, index, calls) {
  const errors = [];
  const client = new Client({ name: "acceptance-ts", version: "1.0.0" });
  const transport = new StreamableHTTPClientTransport(new URL(args.url));
  await client.connect(transport);
  for (let expected = 1; expected <= calls; expected++) {
    const tag = `${args.tag}/${index}/${expected}`;
    const result = await client.callTool({ name: "increment", arguments: { tag } });
    const got = result.content[0].text;
    if (got !== String(expected)) errors.push(`session ${index}: expected ${expected}, got ${got}`);
  }
  await transport.terminateSession();
  await client.close();
  return errors;
}

const sessions = Number(args.sessions);
const calls = Number(args.calls);
const started = performance.now();
const sdk = load();
const outcomes = await Promise.allSettled(Array.from({ length: sessions }, (_, index) => count(sdk, index, calls)));
const errors = outcomes.flatMap((outcome, index) =>
  outcome.status === "fulfilled" ? outcome.value : [`session ${index}: ${outcome.reason}`],
);
const seconds = Math.round((performance.now() - started) / 10) / 100;
const line = JSON.stringify({ client: name, version: version(), sessions, calls, seconds, errors });
console.log(line);
if (args.out) writeFileSync(args.out, line + "\n");
process.exit(errors.length ? 1 : 0);
