// The official TypeScript SDKs: turned away, authorized, let in. Arguments: address, version of the SDK.
const [address, version] = process.argv.slice(2);
const from = version === '1' ? '@modelcontextprotocol/sdk/client/' : '@modelcontextprotocol/client';
const { Client } = await import(version === '1' ? `${from}index.js` : from);
const { StreamableHTTPClientTransport } = await import(version === '1' ? `${from}streamableHttp.js` : from);
const { UnauthorizedError } = await import(version === '1' ? `${from}auth.js` : from);

const redirect = 'http://127.0.0.1:1/callback';
const kept = {};
let cameBack;
const authProvider = {
  redirectUrl: redirect,
  clientMetadata: { client_name: 'agent', redirect_uris: [redirect], token_endpoint_auth_method: 'none' },
  state: () => 'state-1',
  clientInformation: () => kept.client,
  saveClientInformation: client => { kept.client = client; },
  tokens: () => kept.tokens,
  saveTokens: tokens => { kept.tokens = tokens; },
  codeVerifier: () => kept.verifier,
  saveCodeVerifier: verifier => { kept.verifier = verifier; },
  redirectToAuthorization: async url => {
    const answer = await fetch(url, { redirect: 'manual' });
    cameBack = new URL(answer.headers.get('location')).searchParams;
  },
};

const connect = async () => {
  const client = new Client({ name: 'agent', version: '1' });
  const transport = new StreamableHTTPClientTransport(new URL(address), { authProvider });
  try {
    await client.connect(transport);
    return client;
  } catch (error) {
    if (!(error instanceof UnauthorizedError)) throw error;
    await transport.finishAuth(version === '1' ? cameBack.get('code') : cameBack);
    return null;
  }
};

const client = (await connect()) ?? (await connect());
const echo = await client.callTool({ name: 'echo', arguments: { message: 'hi' } });
console.log(JSON.stringify(echo.structuredContent));
await client.close();
