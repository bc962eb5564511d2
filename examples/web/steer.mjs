// A call of Generate over grpc-web: one POST, whose response body has a frame for each message and one for the status.
const GENERATE = '/steer.v1.GenerationService/Generate';
const HEADER_BYTES = 5; // of a frame: its kind, and the length of what follows
const STATUS = 0x80; // kind of the last frame, whose text is like that of HTTP headers

/** A status that is not OK; `code` is one of gRPC. */
export class CallError extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

/**
 * The responses to a request, as they come. `root` has the messages of the contract, loaded by protobuf.js. Leaving the
 * loop, or aborting `signal`, ends the request on the server.
 */
export async function* generate(server, root, request, { clientId, token, signal } = {}) {
  const [Request, Response] = ['Request', 'Response'].map((kind) => root.lookupType(`steer.v1.Generate${kind}`));
  const leaving = new AbortController();
  const answer = await fetch(server + GENERATE, {
    method: 'POST',
    headers: {
      'content-type': 'application/grpc-web+proto',
      'x-grpc-web': '1',
      ...(clientId && { 'steer-client-id': clientId }),
      ...(token && { authorization: `Bearer ${token}` }),
    },
    body: frame(Request.encode(Request.fromObject(request)).finish()),
    signal: signal ? AbortSignal.any([signal, leaving.signal]) : leaving.signal,
  });
  try {
    check(answer.headers); // a refusal has its status there, and no body
    if (!answer.ok) throw new CallError(2, `HTTP status ${answer.status}`);
    for await (const { kind, body } of frames(answer.body)) {
      if (kind & STATUS) {
        check(headersOf(new TextDecoder().decode(body)));
        return;
      }
      yield Response.toObject(Response.decode(body), { longs: Number, enums: String, oneofs: true, defaults: true });
    }
    throw new CallError(14, 'the response ended without a status');
  } finally {
    leaving.abort();
  }
}

function check(headers) {
  const code = Number(headers.get('grpc-status') ?? 0);
  if (code) throw new CallError(code, decodeURIComponent(headers.get('grpc-message') ?? ''));
}

function headersOf(text) {
  const lines = text.split('\r\n').filter((line) => line);
  return new Headers(lines.map((line) => [line.slice(0, line.indexOf(':')), line.slice(line.indexOf(':') + 1)]));
}

function frame(message) {
  const framed = new Uint8Array(HEADER_BYTES + message.length);
  new DataView(framed.buffer).setUint32(1, message.length);
  framed.set(message, HEADER_BYTES);
  return framed;
}

async function* frames(body) {
  let rest = new Uint8Array();
  const reader = body.getReader();
  for (let { done, value } = await reader.read(); !done; { done, value } = await reader.read()) {
    rest = joined(rest, value);
    while (rest.length >= HEADER_BYTES) {
      const end = HEADER_BYTES + new DataView(rest.buffer, rest.byteOffset).getUint32(1);
      if (rest.length < end) break;
      yield { kind: rest[0], body: rest.subarray(HEADER_BYTES, end) };
      rest = rest.subarray(end);
    }
  }
}

function joined(first, second) {
  const both = new Uint8Array(first.length + second.length);
  both.set(first);
  both.set(second, first.length);
  return both;
}
