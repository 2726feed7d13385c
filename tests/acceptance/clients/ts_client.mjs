// Counter client on the TypeScript SDK: 1.x (`--sdk 1`, the default) or the 2.x client (`--sdk 2`).
import { readFileSync, writeFileSync } from "node:fs";
import { parseArgs } from "node:util";

const { values: args } = parseArgs({
  options: {
    url: { type: "string" },
    sessions: { type: "string", default: "20" },
    calls: { type: "string", default: "50" },
    tag: { type: "string", default: "ts" },
    out: { type: "string" },
    sdk: { type: "string", default: "1" },
  },
});

const name = args.sdk === "2" ? "@modelcontextprotocol/client" : "@modelcontextprotocol/sdk";

async function load() {
  if (args.sdk === "2") {
    const { Client, StreamableHTTPClientTransport } = await import("@modelcontextprotocol/client");
    return { Client, StreamableHTTPClientTransport };
  }
  const { Client } = await import("@modelcontextprotocol/sdk/client/index.js");
  const { StreamableHTTPClientTransport } = await import("@modelcontextprotocol/sdk/client/streamableHttp.js");
  return { Client, StreamableHTTPClientTransport };
}

function version() {
  const path = new URL(`../node_modules/${name}/package.json`, import.meta.url);
  return JSON.parse(readFileSync(path, "utf8")).version;
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
const sdk = await load();
const outcomes = await Promise.allSettled(Array.from({ length: sessions }, (_, index) => count(sdk, index, calls)));
const errors = outcomes.flatMap((outcome, index) =>
  outcome.status === "fulfilled" ? outcome.value : [`session ${index}: ${outcome.reason}`],
);
const seconds = Math.round((performance.now() - started) / 10) / 100;
const line = JSON.stringify({ client: name, version: version(), sessions, calls, seconds, errors });
console.log(line);
if (args.out) writeFileSync(args.out, line + "\n");
process.exit(errors.length ? 1 : 0);
