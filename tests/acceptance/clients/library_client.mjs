// The TypeScript SDK's client, with version negotiation on, on the library server: the last line says what it found.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { parseArgs } from "node:util";

const { values: args } = parseArgs({ options: { url: { type: "string" }, packages: { type: "string" } } });
const name = "@modelcontextprotocol/client";
const { Client, StreamableHTTPClientTransport } = createRequire(join(args.packages, "any.js"))(name);

const client = new Client({ name: "acceptance-ts", version: "1.0.0" }, { versionNegotiation: { mode: "auto" } });
await client.connect(new StreamableHTTPClientTransport(new URL(args.url)));
const progress = [];
const onprogress = (seen) => progress.push(seen.progress);
const { tools } = await client.listTools();
await client.callTool({ name: "read_aloud", arguments: { pages: 3 } }, { onprogress });
const found = {
  client: name,
  version: JSON.parse(readFileSync(join(args.packages, name, "package.json"), "utf8")).version,
  protocol: client.getNegotiatedProtocolVersion(),
  tools: tools.length,
  resources: (await client.listResources()).resources.length,
  prompts: (await client.listPrompts()).prompts.length,
  text: (await client.readResource({ uri: "book://dune" })).contents[0].text,
  found: (await client.callTool({ name: "find", arguments: { title: "Dune" } })).structuredContent,
  lent: (await client.callTool({ name: "lend", arguments: { shelf: "日本", days: 3 } })).structuredContent,
  progress,
};
await client.close();
console.log(JSON.stringify(found));
