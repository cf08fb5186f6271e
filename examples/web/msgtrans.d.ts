// SPDX-License-Identifier: Apache-2.0
/** A client for the msgtrans wire protocol, version 1, over WebSocket; see msgtrans.js and docs/wire_format.md. */

/** Strings go as UTF-8. Bytes are copied by the call that takes them. */
export type Payload = string | Uint8Array | ArrayBuffer | ArrayBufferView;

export declare const VERSION: 1;
export declare const HEADER_SIZE: 16;
export declare const SUBPROTOCOL: 'msgtrans';
export declare const Compression: Readonly<{ none: 0; zstd: 1; zlib: 2 }>;
export declare const PacketType: Readonly<{ oneWay: 0; request: 1; response: 2 }>;
export declare const Flags: Readonly<{ fragmented: 1; highPriority: 2; routeTag: 4 }>;

/** `code` is the error's name in every msgtrans implementation: `connection_lost`, `request_timeout`, ... */
export declare class MsgtransError extends Error {
  constructor(code: string, message: string, options?: ErrorOptions);
  readonly code: string;
}
/** The peer broke the protocol, and the connection was ended; the text names the field and the value. */
export declare class ProtocolError extends MsgtransError {
  constructor(message: string, closeCode?: number, options?: ErrorOptions);
  /** 1002, or 1003 for what this client does not understand: text messages, and codecs it does not have. */
  readonly closeCode: number;
}
/** The connection ended with the request unanswered: whether the peer acted on it is unknown. */
export declare class ConnectionLost extends MsgtransError {
  constructor(message: string);
}
/** No connection, so nothing was sent. */
export declare class NotConnected extends MsgtransError {
  constructor(message: string);
}
export declare class RequestTimeout extends MsgtransError {
  constructor(message: string);
}
/** Over a limit of this end's own; nothing was sent. */
export declare class TooLarge extends MsgtransError {
  constructor(message: string);
}
/** As much as `maxBuffered` allows waits to be sent already; nothing was sent. */
export declare class WouldBlock extends MsgtransError {
  constructor(message: string);
}

export interface Packet {
  compression: 0 | 1 | 2;
  type: 0 | 1 | 2;
  bizType: number;
  id: number;
  highPriority: boolean;
  routeTag: boolean;
  extension: Uint8Array;
  /** As it is on the wire. */
  payload: Uint8Array;
}

export interface PacketFields {
  type: 0 | 1 | 2;
  id: number;
  compression?: 0 | 1 | 2 | undefined;
  bizType?: number | undefined;
  highPriority?: boolean | undefined;
  routeTag?: boolean | undefined;
  extension?: Payload | undefined;
  /** Compressed already if `compression` says so. */
  payload?: Payload | undefined;
}

export interface Limits {
  /** Largest payload on the wire, either way, in bytes; itself allowed. Default 16 MiB. */
  maxPayload: number;
  /** Largest extension header, either way, in bytes. Default 65,535. */
  maxExtension: number;
}

/** The bytes of a packet. */
export declare function encodePacket(fields: PacketFields): Uint8Array;
/** Takes a whole packet apart and checks it; throws `ProtocolError`. Nothing is copied or decompressed. */
export declare function decodePacket(bytes: Uint8Array, limits?: Partial<Limits>): Packet;
/** The id after `last`: never 0, and none that is still pending. */
export declare function nextMessageId(last: number, pending: { has(id: number): boolean }): number;
/** How long to wait before the attempt with this number, the first being 1, in ms. */
export declare function backoff(attempt: number, options?: ReconnectOptions, random?: () => number): number;

/** What came in, with its payload as the sender's application gave it. */
export declare class Message {
  constructor(packet: Packet, payload: Uint8Array);
  readonly type: 0 | 1 | 2;
  readonly bizType: number;
  /** The sender's count; each end counts its own. A response repeats its request's. */
  readonly id: number;
  readonly highPriority: boolean;
  readonly routeTag: boolean;
  readonly extension: Uint8Array;
  readonly payload: Uint8Array;
  get isRequest(): boolean;
  /** The payload as UTF-8. */
  get text(): string;
  /** The payload as JSON. */
  json(): any;
}

export interface SendOptions {
  /** The application's own kind of message, 0 to 255. */
  bizType?: number | undefined;
  extension?: Payload | undefined;
  /** Sets the wire flag. The platform's own queue is in order, so nothing is overtaken here. */
  highPriority?: boolean | undefined;
  /** Tells the receiver that the extension header holds a route tag. */
  routeTag?: boolean | undefined;
}

export interface RequestOptions extends SendOptions {
  /** In ms; 0: for ever. Default `ClientOptions.requestTimeout`. */
  timeout?: number | undefined;
  /** Gives the request up; an answer that comes later is dropped and counted. */
  signal?: AbortSignal | undefined;
}

export interface Answer {
  payload?: Payload | undefined;
  extension?: Payload | undefined;
  highPriority?: boolean | undefined;
  routeTag?: boolean | undefined;
}

/** Returns the answer: a payload, or one with more beside it; nothing is an empty answer. */
export type RequestHandler = (request: Message) => Payload | Answer | void | Promise<Payload | Answer | void>;

export interface ReconnectOptions {
  /** Before the first attempt, in ms. Default 100. */
  initial?: number | undefined;
  /** From one attempt to the next. Default 1.6. */
  factor?: number | undefined;
  /** In ms. Default 30,000. */
  max?: number | undefined;
  /** 0.2: up to 20 % more or less. Default 0.2. */
  jitter?: number | undefined;
  /** In a row. Default: without end. */
  attempts?: number | undefined;
}

/** What is needed of a WebSocket: the browsers' own, Node 22's, or that of the package ws. */
export interface WebSocketLike {
  binaryType: string;
  readonly bufferedAmount: number;
  onopen: ((event: any) => void) | null;
  onmessage: ((event: any) => void) | null;
  onerror: ((event: any) => void) | null;
  onclose: ((event: any) => void) | null;
  send(data: any): void;
  close(code?: number, reason?: string): void;
}

export interface ClientOptions extends Partial<Limits> {
  /** Largest payload after decompression, in bytes; enforced while decompressing. Default 16 MiB. */
  maxDecompressed?: number | undefined;
  /** Bound of what waits to be sent, in bytes; answers to the server's requests are always taken. Default 16 MiB. */
  maxBuffered?: number | undefined;
  /** In ms; 0: for ever. Default 10,000. */
  requestTimeout?: number | undefined;
  /** In ms; 0: as long as the platform waits. Default 10,000. */
  connectTimeout?: number | undefined;
  /** How long the peer may take to agree to a close, in ms. Default 5,000. */
  closeTimeout?: number | undefined;
  /** Off by default. `true`: with the defaults of `ReconnectOptions`. */
  reconnect?: boolean | ReconnectOptions | undefined;
  /** Answers the server's requests; may also be set later. */
  onRequest?: RequestHandler | undefined;
  /** WebSocket subprotocols to offer. Default `['msgtrans']`; `[]` offers none. */
  protocols?: string[] | undefined;
  /** Instead of the platform's; Node before 22 has none. */
  WebSocket?: (new (url: string, protocols?: string[]) => WebSocketLike) | undefined;
  /** Where each connection's message ids start. Default 1. For tests. */
  firstId?: number | undefined;
}

export interface ClientEvents {
  open: { reconnected: boolean };
  /** `code` and `reason` are the peer's, or this end's if it closed; 1006: broken off. */
  close: { code: number; reason: string; error: MsgtransError | undefined; willReconnect: boolean };
  /** A one-way message. */
  message: Message;
  /** The next attempt comes in `delay` ms. */
  reconnecting: { attempt: number; delay: number };
  /** The peer broke the protocol (`close` follows), or `onRequest` failed (the request stays unanswered). */
  error: Error;
}

export interface ClientStats {
  packetsIn: number;
  packetsOut: number;
  bytesIn: number;
  bytesOut: number;
  /** Late, duplicate and forged answers, dropped. */
  unmatchedResponses: number;
  /** Requests of the server that got no answer: no handler, or it failed. */
  unansweredRequests: number;
  requestsTimedOut: number;
  protocolErrors: number;
  reconnects: number;
}

export declare class Client {
  /** `url`: `ws://host:port/path` or `wss://`. Throws `RangeError` or `TypeError` for an option that is not allowed. */
  constructor(url: string | URL, options?: ClientOptions);
  /** Answers the server's requests. */
  onRequest: RequestHandler | undefined;
  get url(): string;
  /** `waiting` is the time before the next attempt to reconnect. */
  get state(): 'closed' | 'connecting' | 'open' | 'closing' | 'waiting';
  /** Bytes that wait to be sent. */
  get bufferedAmount(): number;
  /** Requests that wait for their answers. */
  get pendingRequests(): number;
  /** Counted since the client was made. */
  get stats(): Readonly<ClientStats>;
  /** Calls `listener` at each such event, until the function returned is called. */
  on<K extends keyof ClientEvents>(event: K, listener: (event: ClientEvents[K]) => void): () => void;
  /**
   * Resolves when the connection is open. Without `reconnect` it fails with the first attempt; with it, only when the
   * attempts are used up or `close` is called.
   */
  connect(): Promise<void>;
  /**
   * Sends a one-way message. Returns the bytes that now wait to be sent, this message among them (so never 0); or false:
   * there is no room within `maxBuffered`, and it was not sent. Throws `NotConnected` or `TooLarge`.
   */
  send(payload: Payload, options?: SendOptions): number | false;
  /**
   * Asks, and resolves with the answer. Rejects with `RequestTimeout`, `ConnectionLost` (it is never sent again by
   * itself), `NotConnected`, `TooLarge`, `WouldBlock`, or the reason of `signal`.
   */
  request(payload: Payload, options?: RequestOptions): Promise<Message>;
  /** Resolves when at most half of `maxBuffered` waits to be sent, or the connection has ended. */
  drained(): Promise<void>;
  /** Ends the connection, and reconnecting. Pending requests fail at once; no further message is handed out. */
  close(code?: number, reason?: string): void;
}
