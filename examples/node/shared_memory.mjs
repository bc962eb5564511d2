// Reads captures where the server's engine wrote them: proves that this process shares the memory, and maps it.
import { constants, closeSync, fstatSync, openSync, readSync } from 'node:fs';
import { join } from 'node:path';
import koffi from 'koffi';
import { ask } from './client.mjs';

const NONCE_BYTES = 32;

// Node cannot map a file, and reading one is a copy. koffi calls the two functions of the C library that can.
const libc = koffi.load(null);
const mmap = libc.func('void *mmap(void *address, size_t length, int prot, int flags, int fd, int64_t offset)');
const munmap = libc.func('int munmap(void *address, size_t length)');
const PROT_READ = 1;
const PROT_WRITE = 2;
const MAP_PRIVATE = 2;
const MAP_FAILED = 2n ** 64n - 1n;

/**
 * Opens a session: `token` goes into requests, and until `close` the server keeps what it leases to them.
 *
 * The server writes a nonce into a segment that only its user can read; who sends it back shares its memory. The
 * session lasts as long as the stream on which it was confirmed, so that it ends with this process, however that ends.
 */
export async function openSession(captures, directory) {
  const challenge = await ask(captures, 'openSharedMemory', {});
  const nonce = readNonce(directory, challenge.segmentName);
  const call = captures.confirmSharedMemory({ challengeToken: challenge.challengeToken, nonce });
  const token = await new Promise((resolve, reject) => {
    call.on('data', (message) => resolve(message.sessionToken)); // again every 20 s: the session lasts
    call.on('error', reject);
    call.on('end', () => reject(new Error('the server ended the session')));
  });
  return { token, close: () => call.cancel() };
}

/**
 * Gives every capture that has a `region` its `bytes`, without a copy.
 *
 * Returns what unmaps them: whoever reads a byte after that crashes. Releasing the lease, in contrast, leaves what is
 * mapped as it is.
 */
export function mapCaptures(captures, directory) {
  const mapped = new Map();
  for (const capture of captures.filter(({ region }) => region)) {
    const { segmentName, offset } = capture.region;
    if (!mapped.has(segmentName)) mapped.set(segmentName, map(directory, segmentName));
    capture.bytes = new Uint8Array(mapped.get(segmentName).buffer, offset, capture.totalBytes);
  }
  return () => mapped.forEach(({ address, buffer }) => munmap(address, buffer.byteLength));
}

// The mapping is private: who writes to it by mistake changes a page of his own, where a read-only one would crash.
function map(directory, name) {
  const file = openSegment(directory, name);
  try {
    const { size } = fstatSync(file);
    const address = mmap(null, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    if (address === MAP_FAILED) throw new Error(`cannot map the segment: error ${koffi.errno()}`);
    return { address, buffer: koffi.view(address, size) };
  } finally {
    closeSync(file); // the mapping stays
  }
}

function readNonce(directory, name) {
  const file = openSegment(directory, name);
  try {
    const nonce = Buffer.alloc(NONCE_BYTES);
    readSync(file, nonce);
    return nonce;
  } finally {
    closeSync(file);
  }
}

// Names come from the server: none of them leads out of the directory, or to anything but a plain file.
function openSegment(directory, name) {
  if (!/^[A-Za-z0-9][A-Za-z0-9._-]*$/.test(name)) throw new Error('not the name of a segment');
  const flags = constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK;
  const file = openSync(join(directory, name), flags);
  if (fstatSync(file).isFile()) return file;
  closeSync(file);
  throw new Error('not a segment');
}
