// SPDX-License-Identifier: Apache-2.0
// @ts-check
/**
 * A client for the msgtrans wire protocol, version 1 (docs/wire_format.md), over WebSocket: for browsers, and for Node
 * 20 and newer. No dependencies, no build step. The types are in msgtrans.d.ts.
 *
 *   const client = new Client('ws://127.0.0.1:8002/');
 *   client.on('message', (message) => console.log(message.text));
 *   await client.connect();
 *   console.log((await client.request('ping')).text);
 */

/** @typedef {import('./msgtrans.d.ts').ClientEvents} ClientEvents */
/** @typedef {import('./msgtrans.d.ts').ClientOptions} ClientOptions */
/** @typedef {import('./msgtrans.d.ts').ClientStats} ClientStats */
/** @typedef {import('./msgtrans.d.ts').Limits} Limits */
/** @typedef {import('./msgtrans.d.ts').Packet} Packet */
/** @typedef {import('./msgtrans.d.ts').PacketFields} PacketFields */
/** @typedef {import('./msgtrans.d.ts').Payload} Payload */
/** @typedef {import('./msgtrans.d.ts').ReconnectOptions} ReconnectOptions */
/** @typedef {import('./msgtrans.d.ts').RequestHandler} RequestHandler */
/** @typedef {import('./msgtrans.d.ts').RequestOptions} RequestOptions */
/** @typedef {import('./msgtrans.d.ts').SendOptions} SendOptions */
/** @typedef {import('./msgtrans.d.ts').WebSocketLike} WebSocketLike */

export const VERSION = 1;
export const HEADER_SIZE = 16;
/** The subprotocol that is offered unless `protocols` says otherwise. */
export const SUBPROTOCOL = 'msgtrans';

export const Compression = Object.freeze({ none: 0, zstd: 1, zlib: 2 });
export const PacketType = Object.freeze({ oneWay: 0, request: 1, response: 2 });
export const Flags = Object.freeze({ fragmented: 1, highPriority: 2, routeTag: 4 });

const MAX_ID = 0xffffffff;
const MAX_TIMEOUT = 0x7fffffff; // what setTimeout can hold
const CODEC_NAMES = ['none', 'zstd', 'zlib'];

const encoder = new TextEncoder();
const decoder = new TextDecoder();

// ---- errors: all have a `code`, which is their name in other languages' clients ----

export class MsgtransError extends Error {
  /** @param {string} code @param {string} message @param {ErrorOptions} [options] */
  constructor(code, message, options) {
    super(message, options);
    this.name = new.target.name;
    this.code = code;
  }
}

/** The peer broke the protocol; the text names the field and the value. */
export class ProtocolError extends MsgtransError {
  /** @param {string} message @param {number} [closeCode] @param {ErrorOptions} [options] */
  constructor(message, closeCode = 1002, options) {
    super('protocol_error', message, options);
    this.closeCode = closeCode;
  }
}

/** The connection ended with the request unanswered: whether the peer acted on it is unknown. */
export class ConnectionLost extends MsgtransError {
  /** @param {string} message */
  constructor(message) {
    super('connection_lost', message);
  }
}

/** No connection, so nothing was sent. */
export class NotConnected extends MsgtransError {
  /** @param {string} message */
  constructor(message) {
    super('closed', message);
  }
}

export class RequestTimeout extends MsgtransError {
  /** @param {string} message */
  constructor(message) {
    super('request_timeout', message);
  }
}

/** Over a limit of this end's own; nothing was sent. */
export class TooLarge extends MsgtransError {
  /** @param {string} message */
  constructor(message) {
    super('too_large', message);
  }
}

/** As much as `maxBuffered` allows waits to be sent already; nothing was sent. */
export class WouldBlock extends MsgtransError {
  /** @param {string} message */
  constructor(message) {
    super('would_block', message);
  }
}

// ---- packets ----

/** @param {Payload | undefined} value @param {string} what @returns {Uint8Array} */
function toBytes(value, what) {
  if (value === undefined) return new Uint8Array(0);
  if (typeof value === 'string') return encoder.encode(value);
  if (value instanceof Uint8Array) return value;
  if (value instanceof ArrayBuffer) return new Uint8Array(value);
  if (ArrayBuffer.isView(value)) return new Uint8Array(value.buffer, value.byteOffset, value.byteLength);
  throw new TypeError(`${what} must be a string or bytes, and is ${value === null ? 'null' : typeof value}`);
}

/** @param {unknown} value @param {string} what @param {number} min @param {number} max @returns {number} */
function inRange(value, what, min, max) {
  if (typeof value === 'number' && Number.isInteger(value) && value >= min && value <= max) return value;
  throw new RangeError(`${what} is ${String(value)}, must be a whole number from ${min} to ${max}`);
}

/**
 * The bytes of a packet.
 * @param {PacketFields} fields
 * @returns {Uint8Array}
 */
export function encodePacket(fields) {
  const extension = toBytes(fields.extension, 'extension');
  const payload = toBytes(fields.payload, 'payload');
  if (extension.length > 0xffff) throw new TooLarge(`the extension header is ${extension.length} bytes, over 65535`);
  const packet = new Uint8Array(HEADER_SIZE + extension.length + payload.length);
  const header = new DataView(packet.buffer);
  header.setUint8(0, VERSION);
  header.setUint8(1, inRange(fields.compression ?? Compression.none, 'compression', 0, 2));
  header.setUint8(2, inRange(fields.type, 'type', 0, 2));
  header.setUint8(3, inRange(fields.bizType ?? 0, 'bizType', 0, 255));
  header.setUint32(4, inRange(fields.id, 'id', 0, MAX_ID));
  header.setUint16(8, extension.length);
  header.setUint32(10, payload.length);
  header.setUint16(14, (fields.highPriority ? Flags.highPriority : 0) | (fields.routeTag ? Flags.routeTag : 0));
  packet.set(extension, HEADER_SIZE);
  packet.set(payload, HEADER_SIZE + extension.length);
  return packet;
}

/**
 * Takes a packet apart and checks it; the payload stays compressed if it is. Nothing is copied.
 * @param {Uint8Array} bytes the whole packet and nothing else
 * @param {Partial<Limits>} [limits]
 * @returns {Packet}
 * @throws {ProtocolError} for the first fault in the order of the header's fields
 */
export function decodePacket(bytes, { maxPayload = DEFAULTS.maxPayload, maxExtension = DEFAULTS.maxExtension } = {}) {
  if (bytes.length < HEADER_SIZE) {
    throw new ProtocolError(`a message of ${bytes.length} bytes, shorter than a header of ${HEADER_SIZE}`);
  }
  const header = new DataView(bytes.buffer, bytes.byteOffset, HEADER_SIZE);
  const version = header.getUint8(0);
  const compression = header.getUint8(1);
  const type = header.getUint8(2);
  const extLength = header.getUint16(8);
  const payloadLength = header.getUint32(10);
  const flags = header.getUint16(14);
  if (version !== VERSION) throw new ProtocolError(`version is ${version}, must be 1`);
  if (compression > 2) {
    throw new ProtocolError(`compression is ${compression}, must be 0 (none), 1 (zstd) or 2 (zlib)`);
  }
  if (type > 2) throw new ProtocolError(`type is ${type}, must be 0 (one-way), 1 (request) or 2 (response)`);
  if (extLength > maxExtension) {
    throw new ProtocolError(`ext_len is ${extLength}, over the limit of ${maxExtension} bytes`);
  }
  if (payloadLength > maxPayload) {
    throw new ProtocolError(`payload_len is ${payloadLength}, over the limit of ${maxPayload} bytes`);
  }
  if (flags & Flags.fragmented) {
    throw new ProtocolError(`flags is ${flags}, bit 0 (fragmented) is reserved and must be 0`);
  }
  const length = HEADER_SIZE + extLength + payloadLength;
  if (bytes.length !== length) {
    throw new ProtocolError(
      `a message of ${bytes.length} bytes, ${bytes.length < length ? 'shorter' : 'longer'} than its packet of ${length}`,
    );
  }
  return {
    compression: /** @type {Packet['compression']} */ (compression),
    type: /** @type {Packet['type']} */ (type),
    bizType: header.getUint8(3),
    id: header.getUint32(4),
    highPriority: (flags & Flags.highPriority) !== 0,
    routeTag: (flags & Flags.routeTag) !== 0,
    extension: bytes.subarray(HEADER_SIZE, HEADER_SIZE + extLength),
    payload: bytes.subarray(HEADER_SIZE + extLength),
  };
}

/**
 * The id after `last`: never 0, and none that is still pending.
 * @param {number} last @param {{ has(id: number): boolean }} pending @returns {number}
 */
export function nextMessageId(last, pending) {
  let id = last;
  do id = id === MAX_ID ? 1 : id + 1;
  while (pending.has(id));
  return id;
}

/** What came in, with its payload as the sender's application gave it. */
export class Message {
  /** @param {Packet} packet @param {Uint8Array} payload */
  constructor(packet, payload) {
    this.type = packet.type;
    this.bizType = packet.bizType;
    this.id = packet.id;
    this.highPriority = packet.highPriority;
    this.routeTag = packet.routeTag;
    this.extension = packet.extension;
    this.payload = payload;
  }
  get isRequest() {
    return this.type === PacketType.request;
  }
  /** The payload as UTF-8. */
  get text() {
    return decoder.decode(this.payload);
  }
  /** The payload as JSON. @returns {any} */
  json() {
    return JSON.parse(this.text);
  }
}

// ---- decompression ----

/**
 * One RFC 1950 stream of at most `limit` bytes, or an error; what is over the limit is never unpacked.
 * @param {Uint8Array} bytes @param {number} limit @returns {Promise<Uint8Array>}
 */
async function inflateOnce(bytes, limit) {
  const codec = new DecompressionStream('deflate');
  const writer = codec.writable.getWriter();
  // Their failures are those of the reader, which says them.
  writer.write(/** @type {Uint8Array<ArrayBuffer>} */ (bytes)).catch(() => {});
  writer.close().catch(() => {});
  const reader = codec.readable.getReader();
  /** @type {Uint8Array[]} */
  const parts = [];
  let size = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    size += value.length;
    if (size > limit) {
      reader.cancel().catch(() => {});
      throw new ProtocolError(`payload (zlib) decompresses to more than the limit of ${limit} bytes`);
    }
    parts.push(value);
  }
  if (parts.length === 1 && parts[0]) return parts[0];
  const whole = new Uint8Array(size);
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

/** @type {Promise<boolean> | undefined} */
let refusesJunk;

/** Whether this platform refuses what follows a stream: browsers do, Node 20 does not. */
function platformRefusesJunk() {
  const emptyAndJunk = Uint8Array.of(0x78, 0x9c, 3, 0, 0, 0, 0, 1, 0xff);
  refusesJunk ??= inflateOnce(emptyAndJunk, 1).then(
    () => false,
    () => true,
  );
  return refusesJunk;
}

/** @param {Uint8Array} bytes @param {number} limit @returns {Promise<Uint8Array>} */
async function inflate(bytes, limit) {
  /** @type {Uint8Array} */
  let plain;
  try {
    plain = await inflateOnce(bytes, limit);
  } catch (error) {
    if (error instanceof ProtocolError) throw error;
    throw new ProtocolError(`payload (zlib) does not decompress: ${textOf(error)}`, 1002, { cause: error });
  }
  if (!(await platformRefusesJunk())) {
    // A stream that is whole without its last byte has ended before it.
    const endsEarlier = await inflateOnce(bytes.subarray(0, -1), limit).then(
      () => true,
      () => false,
    );
    if (endsEarlier) throw new ProtocolError('payload (zlib) does not decompress: more bytes than one stream');
  }
  return plain;
}

/** @param {unknown} error */
function textOf(error) {
  return error instanceof Error ? error.message : String(error);
}

// ---- the client ----

const DEFAULTS = {
  maxPayload: 16 * 1024 * 1024,
  maxDecompressed: 16 * 1024 * 1024,
  maxExtension: 65535,
  maxBuffered: 16 * 1024 * 1024,
  requestTimeout: 10_000,
  connectTimeout: 10_000,
  closeTimeout: 5_000,
  firstId: 1,
  protocols: [SUBPROTOCOL],
};

const RECONNECT = { initial: 100, factor: 1.6, max: 30_000, jitter: 0.2, attempts: Infinity };
/** A connection that lasted this long, or brought a packet, was a good one: the next delay is the first again. */
const GOOD_AFTER = 5_000;

/**
 * How long to wait before the attempt with this number, the first being 1.
 * @param {number} attempt @param {ReconnectOptions} [options] @param {() => number} [random] @returns {number} ms
 */
export function backoff(attempt, options = {}, random = Math.random) {
  const { initial, factor, max, jitter } = withDefaults(RECONNECT, options);
  return Math.min(max, initial * factor ** (attempt - 1)) * (1 + jitter * (2 * random() - 1));
}

/**
 * @typedef {{
 *   resolve: (message: Message) => void,
 *   reject: (error: unknown) => void,
 *   timer: ReturnType<typeof setTimeout> | undefined,
 *   forget: () => void,
 * }} Pending
 */

/**
 * What belongs to one connection and ends with it: the ids, what is pending, the order of what comes in.
 * @typedef {{
 *   socket: WebSocketLike,
 *   open: boolean,
 *   ended: boolean,
 *   lastId: number,
 *   pending: Map<number, Pending>,
 *   inbound: Promise<void> | undefined,
 *   received: boolean,
 *   openedAt: number,
 *   timer: ReturnType<typeof setTimeout> | undefined,
 *   ending: { code: number, reason: string, error: MsgtransError | undefined } | undefined,
 * }} Connection
 */

export class Client {
  /** @type {RequestHandler | undefined} Answers the server's requests. */
  onRequest;

  #url;
  #options;
  /** @type {typeof RECONNECT | undefined} */
  #reconnect;
  /** @type {new (url: string, protocols?: string[]) => WebSocketLike} */
  #WebSocket;
  /** @type {Connection | undefined} */
  #connection;
  /** @type {'closed' | 'connecting' | 'open' | 'closing' | 'waiting'} */
  #state = 'closed';
  #reconnectWanted = false;
  #attempt = 0;
  #opened = 0;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #retry;
  /** @type {{ promise: Promise<void>, resolve: () => void, reject: (error: unknown) => void } | undefined} */
  #connecting;
  /** @type {Promise<void> | undefined} */
  #drained;
  /** @type {Map<string, Set<(event: any) => void>>} */
  #listeners = new Map();
  /** @type {ClientStats} */
  #stats = {
    packetsIn: 0,
    packetsOut: 0,
    bytesIn: 0,
    bytesOut: 0,
    unmatchedResponses: 0,
    unansweredRequests: 0,
    requestsTimedOut: 0,
    protocolErrors: 0,
    reconnects: 0,
  };

  /** @param {string | URL} url `ws://host:port/path` or `wss://` @param {ClientOptions} [options] */
  constructor(url, options = {}) {
    this.#url = String(url);
    this.#options = withDefaults(DEFAULTS, options);
    const o = this.#options;
    inRange(o.maxPayload, 'maxPayload', 1, 2 ** 30);
    inRange(o.maxDecompressed, 'maxDecompressed', 1, 2 ** 30);
    inRange(o.maxExtension, 'maxExtension', 0, 65535);
    inRange(o.maxBuffered, 'maxBuffered', 1, Number.MAX_SAFE_INTEGER);
    inRange(o.requestTimeout, 'requestTimeout', 0, MAX_TIMEOUT);
    inRange(o.connectTimeout, 'connectTimeout', 0, MAX_TIMEOUT);
    inRange(o.closeTimeout, 'closeTimeout', 1, MAX_TIMEOUT);
    inRange(o.firstId, 'firstId', 1, MAX_ID);
    if (options.reconnect) {
      this.#reconnect = withDefaults(RECONNECT, options.reconnect === true ? {} : options.reconnect);
      const { initial, factor, max, jitter, attempts } = this.#reconnect;
      if (!(initial > 0 && factor >= 1 && max >= initial && max <= MAX_TIMEOUT / 2)) {
        throw new RangeError(`reconnect: initial ${initial}, factor ${factor} and max ${max} do not fit together`);
      }
      if (!(jitter >= 0 && jitter <= 1)) throw new RangeError(`reconnect.jitter is ${jitter}, must be from 0 to 1`);
      if (!(attempts >= 1)) throw new RangeError(`reconnect.attempts is ${attempts}, must be at least 1`);
    }
    const constructor = options.WebSocket ?? /** @type {any} */ (globalThis).WebSocket;
    if (typeof constructor !== 'function') {
      throw new TypeError('there is no WebSocket here (Node before 22): pass a constructor as options.WebSocket');
    }
    this.#WebSocket = constructor;
    this.onRequest = options.onRequest;
  }

  get url() {
    return this.#url;
  }
  /** `waiting` is the time before the next attempt to reconnect. */
  get state() {
    return this.#state;
  }
  /** Bytes that wait to be sent. */
  get bufferedAmount() {
    return this.#connection?.socket.bufferedAmount ?? 0;
  }
  /** Requests that wait for their answers. */
  get pendingRequests() {
    return this.#connection?.pending.size ?? 0;
  }
  /** Counted since the client was made. @returns {Readonly<ClientStats>} */
  get stats() {
    return { ...this.#stats };
  }

  /**
   * Calls `listener` at each such event until the function returned is called. What a listener throws is reported as
   * the platform reports uncaught errors, and disturbs nothing else.
   * @template {keyof ClientEvents} K
   * @param {K} event
   * @param {(event: ClientEvents[K]) => void} listener
   * @returns {() => void}
   */
  on(event, listener) {
    let listeners = this.#listeners.get(event);
    if (!listeners) this.#listeners.set(event, (listeners = new Set()));
    listeners.add(listener);
    return () => void listeners.delete(listener);
  }

  /**
   * Resolves when the connection is open. Without `reconnect` it fails with the first attempt; with it, only when the
   * attempts are used up or `close` is called.
   * @returns {Promise<void>}
   */
  connect() {
    if (this.#connecting) return this.#connecting.promise;
    if (this.#state === 'open') return Promise.resolve();
    if (this.#state === 'closing') return Promise.reject(new NotConnected('the connection is being closed'));
    const promise = this.#promiseToConnect();
    if (this.#state === 'connecting') return promise; // an attempt to reconnect is under way
    this.#attempt = 0;
    clearTimeout(this.#retry);
    this.#open();
    return promise;
  }

  /**
   * Sends a one-way message.
   * @param {Payload} payload @param {SendOptions} [options]
   * @returns {number | false} the bytes that now wait to be sent, this message among them (so never 0); false: no room
   *   within `maxBuffered`, and not sent; `drained()` says when there is
   * @throws {NotConnected} @throws {TooLarge}
   */
  send(payload, options = {}) {
    const connection = this.#current();
    const [extension, bytes] = this.#checked(payload, options);
    const size = HEADER_SIZE + extension.length + bytes.length;
    if (!this.#room(connection, size)) return false;
    this.#write(connection, PacketType.oneWay, this.#takeId(connection), options.bizType, options, extension, bytes);
    return Math.max(connection.socket.bufferedAmount, size);
  }

  /**
   * Asks, and resolves with the answer. Rejects with `RequestTimeout`, `ConnectionLost` (never sent again by itself),
   * `NotConnected`, `TooLarge`, `WouldBlock`, or the reason of `signal`.
   * @param {Payload} payload @param {RequestOptions} [options]
   * @returns {Promise<Message>}
   */
  async request(payload, options = {}) {
    const { signal } = options;
    const timeout = inRange(options.timeout ?? this.#options.requestTimeout, 'timeout', 0, MAX_TIMEOUT);
    signal?.throwIfAborted();
    const connection = this.#current();
    const [extension, bytes] = this.#checked(payload, options);
    if (!this.#room(connection, HEADER_SIZE + extension.length + bytes.length)) {
      throw new WouldBlock(`${connection.socket.bufferedAmount} bytes wait to be sent`);
    }
    const id = this.#takeId(connection);
    /** @type {Promise<Message>} */
    const answer = new Promise((resolve, reject) => {
      const abort = () => this.#fail(connection, id, signal?.reason);
      connection.pending.set(id, {
        resolve,
        reject,
        timer: timeout
          ? setTimeout(() => {
              this.#stats.requestsTimedOut++;
              this.#fail(connection, id, new RequestTimeout(`no answer within ${timeout} ms`));
            }, timeout)
          : undefined,
        forget: () => signal?.removeEventListener('abort', abort),
      });
      signal?.addEventListener('abort', abort, { once: true });
    });
    try {
      this.#write(connection, PacketType.request, id, options.bizType, options, extension, bytes);
    } catch (error) {
      this.#fail(connection, id, error);
    }
    return answer;
  }

  /** Resolves when at most half of `maxBuffered` waits to be sent, or the connection has ended. @returns {Promise<void>} */
  drained() {
    // There is no event for it in the platforms.
    this.#drained ??= (async () => {
      const connection = this.#connection;
      for (let pause = 4; this.#isLive(connection) && this.bufferedAmount > this.#options.maxBuffered / 2; ) {
        await new Promise((resolve) => setTimeout(resolve, pause));
        pause = Math.min(pause * 2, 100);
      }
      this.#drained = undefined;
    })();
    return this.#drained;
  }

  /**
   * Ends the connection, and reconnecting. Pending requests fail at once; no further message is handed out.
   * @param {number} [code] 1000, or 3000 to 4999 @param {string} [reason] at most 123 bytes of UTF-8
   */
  close(code = 1000, reason = '') {
    if (code !== 1000) inRange(code, 'code', 3000, 4999);
    if (encoder.encode(reason).length > 123) throw new RangeError('reason is longer than 123 bytes');
    clearTimeout(this.#retry);
    this.#reconnectWanted = false;
    const connecting = this.#connecting;
    this.#connecting = undefined;
    connecting?.reject(new NotConnected('closed before it was connected'));
    if (this.#state === 'waiting') {
      this.#state = 'closed';
      this.#emit('close', { code, reason, error: undefined, willReconnect: false });
    } else if (this.#connection && this.#state !== 'closing') {
      this.#end(this.#connection, { code, reason, error: undefined });
    }
  }

  // ---- inside: connecting and its end ----

  #promiseToConnect() {
    /** @type {() => void} */
    let resolve = () => {};
    /** @type {(error: unknown) => void} */
    let reject = () => {};
    /** @type {Promise<void>} */
    const promise = new Promise((yes, no) => ((resolve = yes), (reject = no)));
    this.#connecting = { promise, resolve, reject };
    this.#reconnectWanted = this.#reconnect !== undefined;
    return promise;
  }

  #open() {
    this.#state = 'connecting';
    /** @type {WebSocketLike} */
    let socket;
    try {
      socket = new this.#WebSocket(this.#url, [...this.#options.protocols]);
    } catch (error) {
      // a URL that is none: trying again cannot help
      this.#state = 'closed';
      this.#reconnectWanted = false;
      const connecting = this.#connecting;
      this.#connecting = undefined;
      connecting?.reject(error);
      return;
    }
    socket.binaryType = 'arraybuffer';
    /** @type {Connection} */
    const connection = {
      socket,
      open: false,
      ended: false,
      lastId: this.#options.firstId - 1,
      pending: new Map(),
      inbound: undefined,
      received: false,
      openedAt: 0,
      timer: undefined,
      ending: undefined,
    };
    this.#connection = connection;
    const { connectTimeout } = this.#options;
    if (connectTimeout) {
      connection.timer = setTimeout(() => {
        const reason = `not connected within ${connectTimeout} ms`;
        connection.ending = { code: 1006, reason, error: undefined };
        try {
          socket.close();
        } catch {}
        this.#closed(connection, 1006, reason);
      }, connectTimeout);
    }
    socket.onopen = () => {
      if (connection.ended || connection.ending) return;
      clearTimeout(connection.timer);
      connection.open = true;
      connection.openedAt = performance.now();
      this.#state = 'open';
      const reconnected = this.#opened++ > 0;
      if (reconnected) this.#stats.reconnects++;
      const connecting = this.#connecting;
      this.#connecting = undefined;
      connecting?.resolve();
      this.#emit('open', { reconnected });
    };
    socket.onmessage = (event) => this.#receive(connection, event.data);
    socket.onerror = () => {
      // The close that follows says more; but where Node 20 has a WebSocket, none follows a failure to connect.
      if (!connection.open) setTimeout(() => this.#closed(connection, 1006, ''));
    };
    socket.onclose = (event) => {
      // What came before is handed out first.
      const closed = () => this.#closed(connection, event.code, event.reason);
      if (connection.inbound) connection.inbound.then(closed);
      else closed();
    };
  }

  /**
   * Ends a connection from this end.
   * @param {Connection} connection @param {NonNullable<Connection['ending']>} ending
   */
  #end(connection, ending) {
    if (connection.ended || connection.ending) return;
    connection.ending = ending;
    this.#state = 'closing';
    clearTimeout(connection.timer);
    this.#failAll(connection, ending.error?.message ?? 'the connection was closed');
    connection.timer = setTimeout(
      () => this.#closed(connection, ending.code, ending.reason),
      this.#options.closeTimeout,
    );
    const reason = shortened(ending.reason);
    try {
      connection.socket.close(ending.code, reason);
    } catch {
      // Browsers let applications say 1000 and 3000 to 4999 only, so 1002 goes as 4002.
      connection.socket.close(ending.code + 3000, reason);
    }
    if (ending.error) this.#emit('error', ending.error);
  }

  /** @param {Connection} connection @param {number} code @param {string} reason */
  #closed(connection, code, reason) {
    if (connection.ended) return;
    connection.ended = true;
    clearTimeout(connection.timer);
    const ending = connection.ending ?? { code, reason, error: undefined };
    this.#failAll(connection, `the connection ended: ${ending.code}${ending.reason ? ' ' + ending.reason : ''}`);
    if (this.#connection === connection) this.#connection = undefined;
    if (connection.open && (connection.received || performance.now() - connection.openedAt >= GOOD_AFTER)) {
      this.#attempt = 0;
    }
    const willReconnect =
      this.#reconnectWanted && this.#reconnect !== undefined && this.#attempt < this.#reconnect.attempts;
    this.#state = willReconnect ? 'waiting' : 'closed';
    /** @type {number | undefined} */
    let delay;
    if (willReconnect) {
      delay = backoff(++this.#attempt, this.#reconnect);
      this.#retry = setTimeout(() => this.#open(), delay);
    } else {
      const connecting = this.#connecting;
      this.#connecting = undefined;
      connecting?.reject(
        new NotConnected(`${this.#url}: no connection (${ending.code}${ending.reason ? ' ' + ending.reason : ''})`),
      );
    }
    // An attempt that failed was never open, so does not close; but the last one ends the story.
    if (connection.open || !willReconnect) {
      this.#emit('close', { code: ending.code, reason: ending.reason, error: ending.error, willReconnect });
    }
    if (delay !== undefined && this.#state === 'waiting') this.#emit('reconnecting', { attempt: this.#attempt, delay });
  }

  // ---- inside: in ----

  /** @param {Connection | undefined} connection */
  #isLive(connection) {
    return connection !== undefined && connection.open && !connection.ended && !connection.ending;
  }

  /** @param {Connection} connection @param {unknown} data */
  #receive(connection, data) {
    if (!this.#isLive(connection)) return;
    /** @type {Packet} */
    let packet;
    try {
      if (!(data instanceof ArrayBuffer)) {
        throw new ProtocolError('a text message, but packets are binary messages', 1003);
      }
      packet = decodePacket(new Uint8Array(data), this.#options);
    } catch (error) {
      this.#inOrder(connection, () => this.#broken(connection, error));
      return;
    }
    this.#stats.bytesIn += data.byteLength;
    this.#inOrder(
      connection,
      packet.compression === Compression.none
        ? () => this.#handle(connection, packet, packet.payload)
        : () =>
            this.#decompress(packet).then(
              (plain) => this.#handle(connection, packet, plain),
              (error) => this.#broken(connection, error),
            ),
    );
  }

  /**
   * Packets are handled in the order they came, though decompressing takes its time.
   * @param {Connection} connection @param {() => void | Promise<void>} step
   */
  #inOrder(connection, step) {
    const running = connection.inbound ? connection.inbound.then(step) : step();
    if (!running) return;
    const done = running.then(() => {
      if (connection.inbound === done) connection.inbound = undefined;
    });
    connection.inbound = done;
  }

  /** @param {Packet} packet @returns {Promise<Uint8Array>} */
  async #decompress(packet) {
    const codec = CODEC_NAMES[packet.compression];
    if (packet.compression !== Compression.zlib || typeof DecompressionStream === 'undefined') {
      throw new ProtocolError(`payload (${codec}) cannot be decompressed by this client`, 1003);
    }
    return inflate(packet.payload, this.#options.maxDecompressed);
  }

  /** @param {Connection} connection @param {unknown} cause */
  #broken(connection, cause) {
    if (!this.#isLive(connection)) return;
    const error = cause instanceof ProtocolError ? cause : new ProtocolError(textOf(cause), 1002, { cause });
    this.#stats.protocolErrors++;
    this.#end(connection, { code: error.closeCode, reason: error.message, error });
  }

  /** @param {Connection} connection @param {Packet} packet @param {Uint8Array} payload */
  #handle(connection, packet, payload) {
    if (!this.#isLive(connection)) return;
    connection.received = true;
    this.#stats.packetsIn++;
    const message = new Message(packet, payload);
    if (packet.type === PacketType.oneWay) {
      this.#emit('message', message);
    } else if (packet.type === PacketType.request) {
      this.#answer(connection, message);
    } else {
      const pending = this.#take(connection, packet.id);
      if (pending) pending.resolve(message);
      else this.#stats.unmatchedResponses++;
    }
  }

  /** @param {Connection} connection @param {Message} request */
  async #answer(connection, request) {
    const handler = this.onRequest;
    if (!handler) {
      this.#stats.unansweredRequests++;
      return;
    }
    try {
      const answer = await handler(request);
      const { payload, ...options } = isPayload(answer) ? { payload: answer } : answer ?? {};
      // The connection that asked, or none: after a reconnect the number means something else.
      if (!this.#isLive(connection)) throw new NotConnected('the connection ended before the answer');
      const [extension, bytes] = this.#checked(payload, options);
      this.#write(connection, PacketType.response, request.id, request.bizType, options, extension, bytes);
    } catch (error) {
      this.#stats.unansweredRequests++;
      this.#emit('error', error instanceof Error ? error : new Error(String(error)));
    }
  }

  // ---- inside: out ----

  #current() {
    const connection = this.#connection;
    if (connection === undefined || !this.#isLive(connection)) throw new NotConnected(`not connected: ${this.#state}`);
    return connection;
  }

  /** @param {Payload | undefined} payload @param {SendOptions} options @returns {[Uint8Array, Uint8Array]} */
  #checked(payload, options) {
    inRange(options.bizType ?? 0, 'bizType', 0, 255);
    const { maxPayload, maxExtension } = this.#options;
    const extension = toBytes(options.extension, 'extension');
    const bytes = toBytes(payload, 'payload');
    if (extension.length > maxExtension) {
      throw new TooLarge(`the extension header is ${extension.length} bytes, over the limit of ${maxExtension}`);
    }
    if (bytes.length > maxPayload) {
      throw new TooLarge(`the payload is ${bytes.length} bytes, over the limit of ${maxPayload}`);
    }
    return [extension, bytes];
  }

  /** A packet larger than the bound goes when nothing else waits. @param {Connection} connection @param {number} size */
  #room({ socket }, size) {
    return socket.bufferedAmount === 0 || socket.bufferedAmount + size <= this.#options.maxBuffered;
  }

  /** @param {Connection} connection */
  #takeId(connection) {
    return (connection.lastId = nextMessageId(connection.lastId, connection.pending));
  }

  /**
   * @param {Connection} connection @param {Packet['type']} type @param {number} id @param {number | undefined} bizType
   * @param {SendOptions} options @param {Uint8Array} extension @param {Uint8Array} payload
   */
  #write(connection, type, id, bizType, options, extension, payload) {
    const { highPriority, routeTag } = options;
    const packet = encodePacket({ type, id, bizType, highPriority, routeTag, extension, payload });
    connection.socket.send(packet);
    this.#stats.packetsOut++;
    this.#stats.bytesOut += packet.length;
  }

  // ---- inside: what is pending, and events ----

  /** @param {Connection} connection @param {number} id @returns {Pending | undefined} */
  #take(connection, id) {
    const pending = connection.pending.get(id);
    if (pending) {
      connection.pending.delete(id);
      clearTimeout(pending.timer);
      pending.forget();
    }
    return pending;
  }

  /** @param {Connection} connection @param {number} id @param {unknown} error */
  #fail(connection, id, error) {
    this.#take(connection, id)?.reject(error);
  }

  /** @param {Connection} connection @param {string} why */
  #failAll(connection, why) {
    for (const id of [...connection.pending.keys()]) this.#fail(connection, id, new ConnectionLost(why));
  }

  /** @template {keyof ClientEvents} K @param {K} event @param {ClientEvents[K]} value */
  #emit(event, value) {
    for (const listener of [...(this.#listeners.get(event) ?? [])]) {
      try {
        listener(value);
      } catch (error) {
        queueMicrotask(() => {
          throw error;
        });
      }
    }
  }
}

/** @param {unknown} value @returns {value is Payload} */
function isPayload(value) {
  return typeof value === 'string' || value instanceof ArrayBuffer || ArrayBuffer.isView(value);
}

/**
 * An option that is undefined is one not given.
 * @template {object} D @param {D} defaults @param {Partial<Record<keyof D, unknown>>} options @returns {D}
 */
function withDefaults(defaults, options) {
  const given = Object.entries(options).filter(([name, value]) => name in defaults && value !== undefined);
  return { ...defaults, ...Object.fromEntries(given) };
}

/** The reason of a close may have 123 bytes of UTF-8. @param {string} reason */
function shortened(reason) {
  let short = reason;
  while (encoder.encode(short).length > 123) short = short.slice(0, -1);
  return short;
}
