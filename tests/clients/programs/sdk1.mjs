// The official TypeScript SDK 1.x.
import { Client } from '@modelcontextprotocol/sdk/client/index.js';
import { StreamableHTTPClientTransport } from '@modelcontextprotocol/sdk/client/streamableHttp.js';
const requestInit = process.env.KEY ? { headers: { Authorization: `Bearer ${process.env.KEY}` } } : undefined;
const client = new Client({ name: 'agent', version: '1' });
await client.connect(new StreamableHTTPClientTransport(new URL(process.argv[2]), { requestInit }));
const { tools } = await client.listTools();
const echo = await client.callTool({ name: 'echo', arguments: { message: 'hi' } });
const progress = [];
await client.callTool({ name: 'test_tool_with_progress' }, undefined, { onprogress: p => progress.push(p.progress) });
console.log(JSON.stringify({ tools: tools.length, echo: echo.structuredContent, progress }));
await client.close();
