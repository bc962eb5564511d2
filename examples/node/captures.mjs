// Puts captured rows together from the messages that bring them, checks them on the way, and decodes them.

/**
 * Reads the captures of one stream, of Generate or of FetchCapture.
 *
 * A capture has `layer`, `site`, `dtype`, `shape` ([rows, hidden size]), `positions` of its rows, and `bytes`: a
 * Uint8Array, or null with a `region` that says where in shared memory they lie.
 */
export class CaptureReader {
  #captures = [];
  #nextCapture = 0;
  #nextSequence = 0;

  /** Bytes of rows that have come: what a FetchCapture that goes on here skips. */
  receivedBytes = 0;

  /** The stream broke off; the next message is the first of another one, which skips `receivedBytes`. */
  beginAgain() {
    this.#nextCapture = this.#nextSequence = 0;
  }

  /** Takes a message; throws for the first that breaks a rule of the contract. */
  read(response) {
    check(response.sequence === this.#nextSequence, `message ${response.sequence} came out of order`);
    this.#nextSequence += 1;
    switch (response.event) {
      case 'captureChunk':
        return this.#add(response.captureChunk);
      case 'captureShm':
        return this.#place(response.captureShm);
    }
  }

  /** The captures, once the stream has ended; throws if one of them has not. */
  complete() {
    check(this.#captures.every((capture) => capture.isDone), 'the stream ended before its captures did');
    return joined(this.#captures);
  }

  #begin(number, header) {
    check(number === this.#nextCapture, `capture ${number} came out of order`);
    this.#nextCapture += 1;
    return (this.#captures[number] ??= arrival(number, header)); // it is there if the stream began again
  }

  #add({ capture: number, offset, header, data, _crc32c: isLast, crc32c: checksum }) {
    check(header || number < this.#nextCapture, `capture ${number} has no header`);
    const capture = header ? this.#begin(number, header) : this.#captures[number];
    check(offset === capture.received, `capture ${number} goes on at byte ${offset}, not at ${capture.received}`);
    check(offset + data.length <= capture.totalBytes, `capture ${number} has more bytes than announced`);
    capture.bytes ??= new Uint8Array(capture.totalBytes);
    capture.bytes.set(data, offset);
    capture.checksum = crc32c(data, capture.checksum);
    capture.received += data.length;
    this.receivedBytes += data.length;
    if (!isLast) return;
    const { received, totalBytes } = capture;
    check(received === totalBytes, `capture ${number} ends after ${received} of ${totalBytes} bytes`);
    check(capture.checksum === checksum, `capture ${number} has the wrong checksum`);
    capture.isDone = true;
  }

  #place(region) {
    const capture = this.#begin(region.capture, region.header);
    if (capture.totalBytes > 0) {
      check(region.segmentName, `capture ${region.capture} lies in shared memory, but nothing says where`);
      capture.region = region;
    } else {
      capture.bytes = new Uint8Array(0);
    }
    capture.isDone = true;
  }
}

/** The first `count` elements of a capture, or all; float32 is read where it lies, the others are converted. */
export function numbers({ bytes, dtype }, count = Infinity) {
  const elements = Math.min(count, bytes.length / ITEM_BYTES[dtype]);
  const { buffer, byteOffset } = bytes; // rows begin at a multiple of 64 of their buffer
  if (dtype === 'float32') return new Float32Array(buffer, byteOffset, elements);
  const halves = new Uint16Array(buffer, byteOffset, elements);
  return dtype === 'bfloat16' ? fromBfloat16(halves) : Float32Array.from(halves, fromFloat16);
}

/** CRC-32C (Castagnoli) of `bytes` that follow bytes with the CRC-32C `before`. */
export function crc32c(bytes, before = 0) {
  let crc = ~before;
  for (const byte of bytes) crc = (crc >>> 8) ^ CRC_OF_BYTE[(crc ^ byte) & 0xff];
  return ~crc >>> 0;
}

const CRC_OF_BYTE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let crc = byte;
  for (let bit = 0; bit < 8; bit += 1) crc = crc & 1 ? (crc >>> 1) ^ 0x82f63b78 : crc >>> 1;
  return crc;
});

const DTYPES = { DTYPE_F32: 'float32', DTYPE_F16: 'float16', DTYPE_BF16: 'bfloat16' };
const ITEM_BYTES = { float32: 4, float16: 2, bfloat16: 2 };

function arrival(number, header) {
  const dtype = DTYPES[header.dtype];
  const totalBytes = header.shape[0] * header.shape[1] * ITEM_BYTES[dtype];
  check(header.totalBytes === totalBytes, `capture ${number} announces bytes that its shape contradicts`);
  return {
    layer: header.layer,
    site: header.site === 'CAPTURE_SITE_BEFORE' ? 'before' : 'after',
    dtype,
    shape: header.shape,
    positions: header.spans.flatMap(({ first, count }) => Array.from({ length: count }, (_, row) => first + row)),
    totalBytes,
    bytes: null,
    region: null,
    received: 0,
    checksum: 0,
    isDone: false,
  };
}

/** One capture for each layer and site: a live one comes in many parts, each with the rows after those before. */
function joined(captures) {
  const parts = new Map();
  for (const capture of captures) {
    const key = `${capture.layer} ${capture.site}`;
    if (!parts.has(key)) parts.set(key, []);
    parts.get(key).push(capture);
  }
  return [...parts.values()].map((part) => (part.length === 1 ? part[0] : concatenated(part)));
}

function concatenated(parts) {
  const totalBytes = parts.reduce((sum, part) => sum + part.totalBytes, 0);
  const whole = {
    ...parts[0],
    shape: [parts.reduce((sum, part) => sum + part.shape[0], 0), parts[0].shape[1]],
    positions: parts.flatMap((part) => part.positions),
    totalBytes,
    bytes: new Uint8Array(totalBytes),
  };
  let offset = 0;
  for (const { bytes } of parts) {
    whole.bytes.set(bytes, offset);
    offset += bytes.length;
  }
  return whole;
}

// A bfloat16 is the upper half of a float32.
function fromBfloat16(halves) {
  return new Float32Array(Uint32Array.from(halves, (half) => half << 16).buffer);
}

function fromFloat16(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  if (exponent === 0x1f) return fraction ? NaN : sign * Infinity;
  return exponent ? sign * (1 + fraction / 1024) * 2 ** (exponent - 15) : sign * fraction * 2 ** -24;
}

function check(holds, message) {
  if (!holds) throw new Error(`the server broke the contract: ${message}`);
}
