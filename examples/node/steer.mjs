// Generates text, steered or not, and captures hidden states: see USAGE, and README.md beside this file.
import { createHash } from 'node:crypto';
import { createInterface } from 'node:readline/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { CaptureReader, numbers } from './captures.mjs';
import { ask, connect, isLost, stream } from './client.mjs';
import { mapCaptures, openSession } from './shared_memory.mjs';

const USAGE = `usage: node steer.mjs ADDRESS --prompt TEXT [options]
  --max-tokens N                 tokens to generate at most (16)
  --steer LAYER:SCALE            adds SCALE times a direction after LAYER, counted from 0
  --layers 1,2                   layers whose hidden states are captured
  --site before|after|both       before or after steering (after)
  --delivery inline|held|shared  how the captures come (inline)
  --live                         they come with the tokens, and not after them
  --dtype float32|model          their element type (model)
  --shm-dir PATH                 where shared memory is seen here (/dev/shm)
  --keep                         keeps held or shared captures until Enter is pressed
  --json                         prints one JSON object at the end, and nothing before`;

const OPTIONS = {
  prompt: { type: 'string' },
  'max-tokens': { type: 'string', default: '16' },
  steer: { type: 'string' },
  layers: { type: 'string', default: '' },
  site: { type: 'string', default: 'after' },
  delivery: { type: 'string', default: 'inline' },
  live: { type: 'boolean', default: false },
  dtype: { type: 'string', default: 'model' },
  'shm-dir': { type: 'string', default: '/dev/shm' },
  keep: { type: 'boolean', default: false },
  json: { type: 'boolean', default: false },
};

const DELIVERIES = {
  inline: 'CAPTURE_DELIVERY_INLINE',
  held: 'CAPTURE_DELIVERY_HELD',
  shared: 'CAPTURE_DELIVERY_SHARED_MEMORY_PREFERRED',
};
const DELIVERED = {
  CAPTURE_DELIVERY_INLINE: 'inline',
  CAPTURE_DELIVERY_HELD: 'held',
  CAPTURE_DELIVERY_SHARED_MEMORY_REQUIRED: 'shared',
};
const SITES = { before: 'CAPTURE_SITE_BEFORE', after: 'CAPTURE_SITE_AFTER', both: 'CAPTURE_SITE_BOTH' };
const ELEMENTS = { float32: 'DTYPE_F32', model: 'DTYPE_UNSPECIFIED' };

const FETCH_ATTEMPTS = 4;
const FETCH_PAUSE_MS = 200;
const FIRST_VALUES = 8;

async function main() {
  const { values: options, positionals } = parseArgs({ options: OPTIONS, allowPositionals: true });
  if (positionals.length !== 1 || !options.prompt) throw new Error(USAGE);
  const client = connect(positionals[0]);
  const session = options.delivery === 'shared' ? await sharedMemory(client, options) : null;
  try {
    const request = await requestFrom(client, options, session);
    const answer = await generate(client, request, options.json ? () => {} : (text) => process.stdout.write(text));
    await withCaptures(client, answer, options, () => (options.json ? printJson(answer) : print(answer)));
  } finally {
    session?.close();
    client.close();
  }
}

/** A session of shared memory; null where this process and the server share none, and the server will say so. */
async function sharedMemory(client, options) {
  try {
    return await openSession(client.captures, options['shm-dir']);
  } catch (error) {
    console.error(`no shared memory: ${error.message}`);
    return null;
  }
}

async function requestFrom(client, options, session) {
  const layers = options.layers.split(',').filter(Boolean).map(wholeNumber);
  return {
    text: options.prompt,
    sampling: { maxTokens: wholeNumber(options['max-tokens']), temperature: 0 },
    steering: options.steer ? await steering(client, options.steer) : null,
    capture: layers.length
      ? {
          layers,
          site: named(SITES, 'site', options.site),
          dtype: named(ELEMENTS, 'dtype', options.dtype),
          delivery: named(DELIVERIES, 'delivery', options.delivery),
          timing: options.live ? 'CAPTURE_TIMING_LIVE' : 'CAPTURE_TIMING_AFTER_FINISH',
          sharedMemorySession: session?.token,
        }
      : null,
  };
}

function named(table, option, name) {
  if (!(name in table)) throw new Error(`--${option} ${name}: it is one of ${Object.keys(table).join(', ')}`);
  return table[name];
}

function wholeNumber(text) {
  if (!/^\d+$/.test(text)) throw new Error(`${text} is not a whole number`);
  return Number(text);
}

/** Adds to every row; the direction, of norm 1 and with equal components, stands for one that means something. */
async function steering(client, text) {
  const [layer, scale] = text.split(':');
  const { model } = await ask(client.info, 'getModel', {});
  const direction = new Float32Array(model.hiddenSize).fill(1 / Math.sqrt(model.hiddenSize));
  const inline = { dtype: 'DTYPE_F32', shape: [model.hiddenSize], data: Buffer.from(direction.buffer) };
  const add = { vector: { inline }, scale: Number(scale) };
  return { layers: [{ layer: wholeNumber(layer), operations: [{ add }] }] };
}

/** The answer to one request, and the captures that came with it; `onText` gets the text as it comes. */
async function generate(client, request, onText) {
  const reader = new CaptureReader();
  const answer = { text: '', tokenIds: [] };
  for await (const response of stream(client.generation, 'generate', request)) {
    reader.read(response);
    switch (response.event) {
      case 'started':
        answer.delivery = DELIVERED[response.started.captureDelivery];
        answer.fallback = response.started.sharedMemoryFallback;
        break;
      case 'token':
        answer.text += response.token.text;
        answer.tokenIds.push(...response.token.tokenIds);
        onText(response.token.text);
        break;
      case 'captureHeld':
        answer.captureId = response.captureHeld.captureId;
        break;
      case 'captureShm':
        answer.leaseToken = response.captureShm.leaseToken;
        break;
      case 'finished':
        answer.receipt = response.finished.receipt;
        break;
      case 'completed':
        answer.isComplete = true;
    }
  }
  if (!answer.isComplete) throw new Error('the stream ended before the request was complete');
  answer.captures = reader.complete();
  return answer;
}

/** Brings the captures that did not come with the answer, hands them to `use`, and frees them. */
async function withCaptures(client, answer, options, use) {
  const { captureId, leaseToken } = answer;
  let unmap = () => {};
  try {
    if (captureId) answer.captures = await fetchHeld(client, captureId);
    if (leaseToken) unmap = mapCaptures(answer.captures, options['shm-dir']);
    checkComplete(answer);
    use();
    if (options.keep) await enter();
  } finally {
    unmap();
    if (captureId) await ask(client.captures, 'releaseCapture', { captureId });
    if (leaseToken) await ask(client.captures, 'releaseCapture', { leaseToken });
  }
}

/** All rows of a held capture; a stream that breaks off is taken up where it ended. */
async function fetchHeld(client, captureId) {
  const reader = new CaptureReader();
  for (let attempt = 1; ; attempt += 1) {
    const request = { captureId, skipBytes: reader.receivedBytes };
    try {
      for await (const response of stream(client.captures, 'fetchCapture', request)) reader.read(response);
      return reader.complete();
    } catch (error) {
      if (!isLost(error) || attempt === FETCH_ATTEMPTS) throw error;
      reader.beginAgain();
      await sleep(FETCH_PAUSE_MS * 2 ** attempt);
    }
  }
}

/** The receipt counts what was captured: what came must be all of it. */
function checkComplete({ captures, receipt }) {
  const came = captures.reduce((sum, capture) => sum + capture.totalBytes, 0);
  if (came !== receipt.bytesCaptured) throw new Error(`${came} bytes came, ${receipt.bytesCaptured} were captured`);
}

async function enter() {
  const terminal = createInterface({ input: process.stdin, output: process.stderr });
  await terminal.question('Enter releases the captures. ');
  terminal.close();
}

function print({ captures, delivery, fallback, receipt }) {
  console.log(`\n${receipt.rowsSteered} rows steered, ${receipt.rowsCaptured} captured`);
  if (fallback !== 'SHARED_MEMORY_FALLBACK_UNSPECIFIED') console.log(`not through shared memory: ${fallback}`);
  for (const capture of captures) {
    const { layer, site, shape, dtype, region, totalBytes } = capture;
    const values = [...numbers(capture, FIRST_VALUES)].map((value) => value.toPrecision(4)).join(' ');
    console.log(`layer ${layer} ${site} [${shape}] ${dtype} ${delivery}: ${values} ...`);
    if (region) console.log(`  in ${region.segmentName} ${region.offset} ${totalBytes}`);
  }
}

function printJson({ text, tokenIds, delivery, fallback, receipt, captures }) {
  const described = captures.map((capture) => ({
    layer: capture.layer,
    site: capture.site,
    dtype: capture.dtype,
    shape: capture.shape,
    positions: capture.positions,
    sha256: createHash('sha256').update(capture.bytes).digest('hex'),
    first: [...numbers(capture, FIRST_VALUES)],
  }));
  const steeringDigest = receipt.steeringDigest.toString('hex');
  console.log(JSON.stringify({ text, tokenIds, delivery, fallback, steeringDigest, captures: described }));
}

main().catch((error) => {
  console.error(error.message);
  process.exitCode = 1;
});
