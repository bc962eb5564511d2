// The server's services, made from the files in proto/ at run time: there is no generated code.
import { randomBytes } from 'node:crypto';
import { fileURLToPath } from 'node:url';
import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';

const PROTO = fileURLToPath(new URL('../../proto', import.meta.url));
const FILES = ['generation', 'capture', 'info'].map((name) => `steer/v1/${name}.proto`);
// With `oneofs`, a message says in `event` which of its kinds it is.
const LOADED = { includeDirs: [PROTO], enums: String, longs: Number, defaults: true, oneofs: true };
const { v1 } = grpc.loadPackageDefinition(protoLoader.loadSync(FILES, LOADED)).steer;

const ANSWER_MS = 10_000;

/** The services at `address`. Captures belong to `clientId`, a secret that goes with every call. */
export function connect(address, clientId = randomBytes(24).toString('base64url')) {
  const credentials = grpc.credentials.createInsecure();
  const options = { interceptors: [sending('steer-client-id', clientId)] };
  const services = {
    generation: new v1.GenerationService(address, credentials, options),
    captures: new v1.CaptureService(address, credentials, options),
    info: new v1.InfoService(address, credentials, options),
  };
  return { ...services, close: () => Object.values(services).forEach((service) => service.close()) };
}

/** Calls a method that gives one answer. */
export function ask(service, method, request) {
  return new Promise((resolve, reject) => {
    const deadline = Date.now() + ANSWER_MS;
    service[method](request, { deadline }, (error, answer) => (error ? reject(error) : resolve(answer)));
  });
}

/** The answers of a method that streams them; whoever leaves the loop ends the call. */
export async function* stream(service, method, request) {
  const call = service[method](request);
  try {
    yield* call;
  } finally {
    call.on('error', () => {}); // that it was cancelled is no news
    call.cancel();
  }
}

/** True if the connection was lost, and the same may be tried again. */
export function isLost(error) {
  return error.code === grpc.status.UNAVAILABLE;
}

function sending(key, value) {
  return (options, nextCall) =>
    new grpc.InterceptingCall(nextCall(options), {
      start(metadata, listener, next) {
        metadata.set(key, value);
        next(metadata, listener);
      },
    });
}
