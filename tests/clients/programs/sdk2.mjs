// The official TypeScript SDK 2, at its defaults (legacy) or in the mode that is named.
import { Client, StreamableHTTPClientTransport } from '@modelcontextprotocol/client';
const requestInit = process.env.KEY ? { headers: { Authorization: `Bearer ${process.env.KEY}` } } : undefined;
const mode = process.argv[3];
const client = new Client({ name: 'agent', version: '1' }, mode && { versionNegotiation: { mode } });
await client.connect(new StreamableHTTPClientTransport(new URL(process.argv[2]), { requestInit }));
const { tools } = await client.listTools();
const echo = await client.callTool({ name: 'echo', arguments: { message: 'hi' } });
const progress = [];
await client.callTool({ name: 'test_tool_with_progress' }, { onprogress: p => progress.push(p.progress) });
console.log(JSON.stringify({ tools: tools.length, echo: echo.structuredContent, progress }));
await client.close();
