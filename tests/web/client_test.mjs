// SPDX-License-Identifier: Apache-2.0
// The browser client against a small WebSocket server, both in this file, so that nothing but Node (20 or newer) is
// needed: node --test tests/web/client_test.mjs
// Names of rules (P1, M3, ...) are those of docs/wire_format.md.
import assert from 'node:assert/strict';
import { createHash, randomBytes } from 'node:crypto';
import http from 'node:http';
import { test } from 'node:test';
import { deflateRawSync, deflateSync, gzipSync } from 'node:zlib';

import {
  Client,
  ConnectionLost,
  NotConnected,
  ProtocolError,
  RequestTimeout,
  TooLarge,
  WouldBlock,
  backoff,
  decodePacket,
  encodePacket,
  nextMessageId,
} from '../../examples/web/msgtrans.js';
import { Queue } from './waiting.mjs';

const [ONE_WAY, REQUEST, RESPONSE] = [0, 1, 2];
const LIMIT = 16 * 1024 * 1024;

// ---- RFC 6455, as much of it as the tests need: whole messages, close, ping ----

const TEXT = 1, BINARY = 2, CLOSE = 8, PING = 9, PONG = 10;

function frame(opcode, payload, masked) {
  const length = payload.length;
  const head = length < 126 ? Buffer.alloc(2) : length < 65536 ? Buffer.alloc(4) : Buffer.alloc(10);
  head[0] = 0x80 | opcode;
  head[1] = (masked ? 0x80 : 0) | (length < 126 ? length : length < 65536 ? 126 : 127);
  if (length >= 65536) head.writeBigUInt64BE(BigInt(length), 2);
  else if (length >= 126) head.writeUInt16BE(length, 2);
  if (!masked) return Buffer.concat([head, payload]);
  const mask = randomBytes(4);
  const hidden = Buffer.from(payload);
  for (let i = 0; i < length; i++) hidden[i] ^= mask[i & 3];
  return Buffer.concat([head, mask, hidden]);
}

/** Calls `take(opcode, payload)` for each frame that the socket brings. */
function readFrames(socket, head, take) {
  let buffer = Buffer.from(head);
  const parse = () => {
    for (;;) {
      if (buffer.length < 2) return;
      let length = buffer[1] & 0x7f, at = 2;
      if (length === 126) [length, at] = [buffer.length < 4 ? Infinity : buffer.readUInt16BE(2), 4];
      else if (length === 127) [length, at] = [buffer.length < 10 ? Infinity : Number(buffer.readBigUInt64BE(2)), 10];
      const masked = (buffer[1] & 0x80) !== 0;
      if (buffer.length < at + (masked ? 4 : 0) + length) return;
      const mask = masked ? buffer.subarray(at, (at += 4)) : undefined;
      const payload = Buffer.from(buffer.subarray(at, at + length));
      if (mask) for (let i = 0; i < length; i++) payload[i] ^= mask[i & 3];
      const opcode = buffer[0] & 0x0f;
      buffer = buffer.subarray(at + length);
      take(opcode, payload);
    }
  };
  let chunks = [], scheduled = false;
  socket.on('data', (chunk) => {
    chunks.push(chunk);
    if (scheduled) return;
    scheduled = true;
    setImmediate(() => {
      scheduled = false;
      buffer = Buffer.concat([buffer, ...chunks]);
      chunks = [];
      parse();
    });
  });
  parse();
}

function closePayload(code, reason) {
  const payload = Buffer.alloc(2 + Buffer.byteLength(reason));
  payload.writeUInt16BE(code);
  payload.write(reason, 2);
  return payload;
}

/** A WebSocket as browsers have it, for Node before 22. */
class NodeWebSocket {
  binaryType = 'blob';
  onopen = null;
  onmessage = null;
  onerror = null;
  onclose = null;
  #socket;
  #closing = false;
  #ended = false;
  #close = [1006, ''];

  constructor(url, protocols = []) {
    const { hostname, port, pathname, protocol } = new URL(url);
    if (protocol !== 'ws:') throw new SyntaxError(`${url} is no WebSocket URL`);
    const key = randomBytes(16).toString('base64');
    const headers = {
      Connection: 'Upgrade', Upgrade: 'websocket', 'Sec-WebSocket-Key': key, 'Sec-WebSocket-Version': 13,
      ...(protocols.length ? { 'Sec-WebSocket-Protocol': protocols.join(', ') } : {}),
    };
    this.request = http.request({ host: hostname, port, path: pathname, headers });
    this.request.on('error', () => this.#end());
    this.request.on('response', (response) => { response.resume(); this.request.destroy(); this.#end(); });
    this.request.on('upgrade', (response, socket, head) => {
      const answered = response.headers['sec-websocket-protocol'];
      // as browsers do
      if (this.#closing || (protocols.length && !protocols.includes(answered))) { socket.destroy(); this.#end(); return; }
      this.#socket = socket;
      socket.setNoDelay();
      socket.on('error', () => {});
      socket.on('close', () => this.#end());
      this.onopen?.({});
      readFrames(socket, head, (opcode, payload) => this.#take(opcode, payload));
    });
    this.request.end();
  }
  get bufferedAmount() {
    return this.#socket?.writableLength ?? 0;
  }
  #take(opcode, payload) {
    if (opcode === CLOSE) {
      this.#close = payload.length < 2 ? [1005, ''] : [payload.readUInt16BE(), payload.toString('utf8', 2)];
      if (!this.#closing) this.#socket.write(frame(CLOSE, payload, true));
      this.#socket.end();
    } else if (opcode === BINARY) {
      this.onmessage?.({ data: payload.buffer.slice(payload.byteOffset, payload.byteOffset + payload.length) });
    } else if (opcode === TEXT) {
      this.onmessage?.({ data: payload.toString() });
    } else if (opcode === PING) {
      this.#socket.write(frame(PONG, payload, true));
    }
  }
  #end() {
    if (this.#ended) return;
    this.#ended = true;
    this.onerror?.({});
    this.onclose?.({ code: this.#close[0], reason: this.#close[1] });
  }
  send(data) {
    this.#socket.write(frame(BINARY, Buffer.from(data), true));
  }
  close(code = 1000, reason = '') {
    if (code !== 1000 && (code < 3000 || code > 4999)) throw new DOMException(`${code}`, 'InvalidAccessError');
    if (this.#closing) return;
    this.#closing = true;
    if (this.#socket) this.#socket.write(frame(CLOSE, closePayload(code, reason), true));
    else this.request.destroy();
  }
}

/** The server's end of one connection. */
class Peer {
  packets = new Queue(5000);
  ended = new Queue(5000);
  constructor(socket, head, request) {
    this.socket = socket;
    this.offered = request.headers['sec-websocket-protocol'];
    this.path = request.url;
    this.answerClose = true;
    let close = { code: 1006, reason: '' };
    socket.setNoDelay();
    socket.on('error', () => {});
    socket.on('close', () => this.ended.push(close));
    readFrames(socket, head, (opcode, payload) => {
      if (opcode === BINARY) this.packets.push(decodePacket(payload));
      if (opcode === CLOSE && this.answerClose) {
        close = { code: payload.length < 2 ? 1005 : payload.readUInt16BE(), reason: payload.toString('utf8', 2) };
        socket.end(frame(CLOSE, payload, false));
      }
    });
  }
  send(...fields) {
    for (const one of fields) this.sendBytes(encodePacket({ type: ONE_WAY, id: 1, ...one }));
  }
  sendBytes(bytes) {
    this.socket.write(frame(BINARY, Buffer.from(bytes), false));
  }
  sendText(text) {
    this.socket.write(frame(TEXT, Buffer.from(text), false));
  }
  close(code, reason) {
    this.socket.write(frame(CLOSE, closePayload(code, reason), false));
  }
  cut() {
    this.socket.destroy();
  }
}

class Server {
  peers = new Queue(5000);
  #all = new Set();
  #http = http.createServer((_, response) => response.writeHead(426).end());
  static async start(t, port = 0) {
    const server = new Server();
    server.#http.on('upgrade', (request, socket, head) => {
      const accept = createHash('sha1')
        .update(request.headers['sec-websocket-key'] + '258EAFA5-E914-47DA-95CA-C5AB0DC85B11')
        .digest('base64');
      const protocol = request.headers['sec-websocket-protocol']?.split(',')[0];
      socket.write(
        'HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n' +
          `Sec-WebSocket-Accept: ${accept}\r\n${protocol ? `Sec-WebSocket-Protocol: ${protocol}\r\n` : ''}\r\n`,
      );
      server.#all.add(socket);
      socket.on('close', () => server.#all.delete(socket));
      server.peers.push(new Peer(socket, head, request));
    });
    await new Promise((resolve, reject) => server.#http.once('error', reject).listen(port, '127.0.0.1', resolve));
    server.port = server.#http.address().port;
    server.url = `ws://127.0.0.1:${server.port}/`;
    t.after(() => server.stop());
    return server;
  }
  stop() {
    for (const socket of this.#all) socket.destroy();
    this.#http.closeAllConnections();
    return new Promise((resolve) => this.#http.close(resolve));
  }
}

// ---- helpers ----

const bytes = (hex) => new Uint8Array(Buffer.from(hex.replaceAll(' ', ''), 'hex'));
const hex = (data) => Buffer.from(data).toString('hex');
const text = (data) => Buffer.from(data).toString();

function newClient(t, url, options = {}) {
  const client = new Client(url, { WebSocket: globalThis.WebSocket ?? NodeWebSocket, ...options });
  for (const event of ['open', 'close', 'message', 'reconnecting', 'error']) {
    const name = event === 'close' ? 'close_' : event; // beside the method
    client[name] = new Queue(5000);
    client.on(event, (value) => client[name].push(value));
  }
  t.after(() => client.close());
  return client;
}

/** A server, a client connected to it, and the server's end of the connection. */
async function connected(t, options = {}) {
  const server = await Server.start(t);
  const client = newClient(t, server.url, options);
  await client.connect();
  return { server, client, peer: await server.peers.next('a connection') };
}

/** Waits until the peer was seen to have read what was sent before. */
async function roundTrip(client, peer) {
  const answer = client.request('round trip', { bizType: 99 });
  const asked = await peer.packets.next();
  peer.send({ type: RESPONSE, id: asked.id });
  await answer;
  return asked;
}

/** A WebSocket in the test's hands. */
class FakeWebSocket {
  static made = [];
  static next() {
    return FakeWebSocket.made.at(-1);
  }
  binaryType = 'blob';
  bufferedAmount = 0;
  sent = [];
  closes = [];
  constructor(url, protocols) {
    Object.assign(this, { url, protocols });
    FakeWebSocket.made.push(this);
  }
  send(data) {
    this.sent.push(decodePacket(data));
    if (!this.writesAtOnce) this.bufferedAmount += data.length;
  }
  close(code, reason) {
    this.closes.push([code, reason]);
  }
  receive(fields) {
    this.onmessage({ data: encodePacket({ type: ONE_WAY, id: 1, ...fields }).buffer });
  }
}

async function fakeConnected(t, options = {}) {
  const client = newClient(t, 'ws://fake/', { WebSocket: FakeWebSocket, ...options });
  const opened = client.connect();
  const socket = FakeWebSocket.next();
  socket.onopen({});
  await opened;
  t.after(() => socket.onclose({ code: 1006, reason: '' }));
  return { client, socket };
}

// ---- packets ----

const VECTORS = {
  V1: ['01000000 00000001 0000 00000000 0000', { type: ONE_WAY, id: 1 }],
  V2: ['01000005 0000002a 0000 0000000b 0000 68656c6c6f20776f726c64', { type: ONE_WAY, id: 42, bizType: 5, payload: 'hello world' }],
  V3: ['0100010a 00000064 0000 00000004 0000 70696e67', { type: REQUEST, id: 100, bizType: 10, payload: 'ping' }],
  V4: ['0100020a 00000064 0000 00000004 0000 706f6e67', { type: RESPONSE, id: 100, bizType: 10, payload: 'pong' }],
  V5: ['01000001 00000002 0003 00000002 0000 616263 6869', { type: ONE_WAY, id: 2, bizType: 1, extension: 'abc', payload: 'hi' }],
  V6: ['01000100 00000003 0004 00000000 0004 deadbeef', { type: REQUEST, id: 3, routeTag: true, extension: bytes('deadbeef') }],
  V7: ['01000000 00000004 0000 00000001 0002 78', { type: ONE_WAY, id: 4, highPriority: true, payload: 'x' }],
  V8: ['01000000 00000005 0002 00000001 0006 7231 78', { type: ONE_WAY, id: 5, highPriority: true, routeTag: true, extension: 'r1', payload: 'x' }],
  V9: ['010002ff ffffffff 0000 00000000 0000', { type: RESPONSE, id: 0xffffffff, bizType: 255 }],
  V10: ['01000000 00000000 0000 00000000 0000', { type: ONE_WAY, id: 0 }],
  V11: ['01010007 00000009 0000 00000018 0000 28b52ffd045859000068656c6c6f20776f726c6468691eb2', { type: ONE_WAY, id: 9, bizType: 7, compression: 1, payload: bytes('28b52ffd045859000068656c6c6f20776f726c6468691eb2') }],
  V12: ['01020007 0000000a 0000 00000013 0000 789ccb48cdc9c95728cf2fca4901001a0b045d', { type: ONE_WAY, id: 10, bizType: 7, compression: 2, payload: bytes('789ccb48cdc9c95728cf2fca4901001a0b045d') }],
};
const V12 = bytes(VECTORS.V12[0]);

for (const [name, [wire, fields]] of Object.entries(VECTORS)) {
  test(`${name} encodes to its bytes, and decodes to its fields`, () => {
    assert.equal(hex(encodePacket(fields)), wire.replaceAll(' ', ''));
    const asBytes = (value = '') => hex(Buffer.from(value));
    const { extension, payload, ...plain } = decodePacket(bytes(wire));
    assert.deepEqual(plain, {
      type: fields.type, id: fields.id, bizType: fields.bizType ?? 0, compression: fields.compression ?? 0,
      highPriority: fields.highPriority ?? false, routeTag: fields.routeTag ?? false,
    });
    assert.equal(hex(extension), asBytes(fields.extension));
    assert.equal(hex(payload), asBytes(fields.payload));
  });
}

test('V13: unknown flags are ignored (F8)', () => {
  const packet = decodePacket(bytes('01000000 00000001 0000 00000000 fff8'));
  assert.deepEqual([packet.highPriority, packet.routeTag, packet.id], [false, false, 1]);
});

const REFUSED = {
  X1: ['00000000 00000001 0000 00000000 0000', 'version is 0, must be 1'],
  X2: ['02000000 00000001 0000 00000000 0000', 'version is 2, must be 1'],
  X3: ['01030000 00000001 0000 00000000 0000', 'compression is 3, must be 0 (none), 1 (zstd) or 2 (zlib)'],
  X4: ['01000300 00000001 0000 00000000 0000', 'type is 3, must be 0 (one-way), 1 (request) or 2 (response)'],
  X5: ['01000000 00000001 0000 01000001 0000', 'payload_len is 16777217, over the limit of 16777216 bytes'],
  X6: ['01000000 00000001 0000 00000000 0001', 'flags is 1, bit 0 (fragmented) is reserved and must be 0'],
  'the first fault is told (E1): version': ['02030300 00000001 ffff ffffffff ffff', 'version is 2, must be 1'],
  'the first fault is told (E1): compression': ['01030300 00000001 ffff ffffffff ffff', 'compression is 3, must be 0 (none), 1 (zstd) or 2 (zlib)'],
  'the first fault is told (E1): type': ['01000300 00000001 ffff ffffffff ffff', 'type is 3, must be 0 (one-way), 1 (request) or 2 (response)'],
  'the first fault is told (E1): payload_len': ['01000000 00000001 ffff ffffffff ffff', 'payload_len is 4294967295, over the limit of 16777216 bytes'],
  'the first fault is told (E1): flags': ['01000000 00000001 ffff 00000000 0003', 'flags is 3, bit 0 (fragmented) is reserved and must be 0'],
  'shorter than a header (T2)': ['01000000 00000001 0000 00000000 00', 'a message of 15 bytes, shorter than a header of 16'],
  'nothing at all (T2)': ['', 'a message of 0 bytes, shorter than a header of 16'],
  'shorter than its packet (T2)': ['01000000 00000001 0001 00000002 0000 7878', 'a message of 18 bytes, shorter than its packet of 19'],
  'longer than its packet (T2)': ['01000000 00000001 0000 00000001 0000 7878', 'a message of 18 bytes, longer than its packet of 17'],
};

for (const [name, [wire, message]] of Object.entries(REFUSED)) {
  test(`refused: ${name}`, () => {
    assert.throws(() => decodePacket(bytes(wire)), { name: 'ProtocolError', code: 'protocol_error', closeCode: 1002, message });
  });
}

test('a length equal to its limit is allowed, one more is not (L2)', () => {
  const limits = { maxPayload: 10, maxExtension: 300 };
  const packet = (extension, payload) =>
    encodePacket({ type: ONE_WAY, id: 1, extension: new Uint8Array(extension), payload: new Uint8Array(payload) });
  assert.equal(decodePacket(packet(300, 10), limits).payload.length, 10);
  assert.throws(() => decodePacket(packet(301, 10), limits), { message: 'ext_len is 301, over the limit of 300 bytes' });
  assert.throws(() => decodePacket(packet(300, 11), limits), { message: 'payload_len is 11, over the limit of 10 bytes' });
  assert.equal(decodePacket(packet(65535, LIMIT)).extension.length, 65535);
});

test('no packet is made of fields that are out of range', () => {
  const good = { type: ONE_WAY, id: 1 };
  for (const bad of [{ id: -1 }, { id: 2 ** 32 }, { id: 1.5 }, { type: 3 }, { bizType: 256 }, { bizType: '1' }, { compression: 3 }]) {
    assert.throws(() => encodePacket({ ...good, ...bad }), RangeError);
  }
  assert.throws(() => encodePacket({ ...good, payload: null }), TypeError);
  assert.throws(() => encodePacket({ ...good, payload: 5 }), TypeError);
  assert.throws(() => encodePacket({ ...good, extension: new Uint8Array(65536) }), TooLarge);
});

test('a packet that lies inside a larger buffer is read where it lies', () => {
  const around = new Uint8Array(V12.length + 20);
  around.set(V12, 7);
  assert.equal(decodePacket(around.subarray(7, 7 + V12.length)).id, 10);
});

// ---- sending and receiving ----

test('payloads of all kinds arrive, with their fields, and ids are drawn on one counter from 1 (M1, M2, M3, P3, F4)', async (t) => {
  const { client, peer } = await connected(t);
  const inside = new Uint8Array([9, 1, 2, 3, 9]).subarray(1, 4);
  client.send('text \u{1F600}', { bizType: 255 });
  client.send(inside, { extension: 'ext', routeTag: true });
  const answer = client.request('ask');
  client.send(inside.slice().buffer, { highPriority: true });
  client.send(new DataView(new Uint8Array([0, 7, 8]).buffer, 1), { extension: new Uint8Array(65535) });
  client.send('');
  client.send('lone \ud800');
  const came = [];
  for (let i = 0; i < 7; i++) came.push(await peer.packets.next());
  assert.deepEqual(came.map((p) => p.id), [1, 2, 3, 4, 5, 6, 7]);
  assert.deepEqual(came.map((p) => p.type), [0, 0, 1, 0, 0, 0, 0]);
  assert.deepEqual(came.map((p) => p.bizType), [255, 0, 0, 0, 0, 0, 0]);
  assert.deepEqual(came.map((p) => p.compression), [0, 0, 0, 0, 0, 0, 0]);
  assert.deepEqual(came.map((p) => text(p.payload)), ['text \u{1F600}', '\x01\x02\x03', 'ask', '\x01\x02\x03', '\x07\x08', '', 'lone \ufffd']);
  assert.deepEqual(came.map((p) => p.routeTag), [false, true, false, false, false, false, false]);
  assert.deepEqual(came.map((p) => p.highPriority), [false, false, false, true, false, false, false]);
  assert.equal(text(came[1].extension), 'ext');
  assert.equal(came[4].extension.length, 65535);
  peer.send({ type: RESPONSE, id: 3, bizType: 0, payload: 'answer', extension: 'beside', highPriority: true });
  const message = await answer;
  assert.deepEqual([message.text, text(message.extension), message.highPriority, message.type], ['answer', 'beside', true, RESPONSE]);
  const { packetsOut, packetsIn, bytesOut, bytesIn } = client.stats;
  assert.deepEqual([packetsOut, packetsIn, bytesIn], [7, 1, 16 + 6 + 6]);
  assert.equal(bytesOut, came.reduce((sum, p) => sum + 16 + p.extension.length + p.payload.length, 0));
});

test('what is sent is copied at once', async (t) => {
  const { client, peer } = await connected(t);
  const payload = new Uint8Array([1, 2, 3]);
  client.send(payload);
  payload.fill(0);
  assert.deepEqual([...(await peer.packets.next()).payload], [1, 2, 3]);
});

test('messages come in order, also with id 0 or a repeated id (M4), and unknown flags (V13)', async (t) => {
  const { client, peer } = await connected(t);
  peer.send({ id: 0, payload: 'a', bizType: 200 }, { id: 5, payload: 'b' }, { id: 5, payload: '{"c":1}' });
  peer.sendBytes(bytes('01000000 00000001 0000 00000000 fff8'));
  peer.send({ payload: 'high', highPriority: true, routeTag: true, extension: 'r' });
  const first = await client.message.next();
  assert.deepEqual([first.text, first.bizType, first.id, first.isRequest], ['a', 200, 0, false]);
  assert.equal((await client.message.next()).text, 'b');
  assert.deepEqual((await client.message.next()).json(), { c: 1 });
  assert.equal((await client.message.next()).payload.length, 0);
  const last = await client.message.next();
  assert.deepEqual([last.highPriority, last.routeTag, text(last.extension)], [true, true, 'r']);
  assert.equal(client.stats.packetsIn, 5);
});

test('payloads of every length of frame, up to the limit itself, go both ways', async (t) => {
  const { client, peer } = await connected(t, { maxBuffered: 64 * 1024 * 1024 });
  for (const size of [0, 109, 110, 65519, 65520, 1 << 20, LIMIT]) {
    const payload = randomBytes(size);
    const answer = client.request(payload);
    const asked = await peer.packets.next();
    assert.equal(Buffer.compare(asked.payload, payload), 0);
    peer.send({ type: RESPONSE, id: asked.id, payload: asked.payload });
    assert.equal(Buffer.compare((await answer).payload, payload), 0);
  }
});

test('the subprotocol is offered, or another, or none', async (t) => {
  const { peer } = await connected(t);
  assert.equal(peer.offered, 'msgtrans');
  assert.equal((await connected(t, { protocols: [] })).peer.offered, undefined);
  assert.equal((await connected(t, { protocols: ['mine'] })).peer.offered, 'mine');
});

// ---- requests ----

test('answers in any order find their requests (Q1, M6), and the same number may be in flight both ways', async (t) => {
  const { client, peer } = await connected(t, { onRequest: (request) => `re: ${request.text}` });
  const answers = [...'abc'].map((name) => client.request(name, { bizType: name.charCodeAt(0) }));
  const asked = [await peer.packets.next(), await peer.packets.next(), await peer.packets.next()];
  peer.send({ type: REQUEST, id: asked[0].id, bizType: 3, payload: 'same id' });
  const response = await peer.packets.next();
  assert.deepEqual([response.type, response.id, response.bizType, text(response.payload)], [RESPONSE, asked[0].id, 3, 're: same id']);
  for (const { id, bizType, payload } of asked.reverse()) {
    peer.send({ type: RESPONSE, id, bizType, payload: text(payload).toUpperCase() });
  }
  assert.deepEqual((await Promise.all(answers)).map((m) => [m.text, m.bizType]), [['A', 97], ['B', 98], ['C', 99]]);
  assert.equal(client.pendingRequests, 0);
  // M5: answering drew no id
  assert.equal((await roundTrip(client, peer)).id, 4);
});

test('a request times out, its late answer is counted and dropped (Q3, Q5), and so are duplicate and forged ones', async (t) => {
  const { client, peer } = await connected(t);
  await assert.rejects(client.request('slow', { timeout: 20 }), (error) => {
    assert(error instanceof RequestTimeout);
    assert.deepEqual([error.code, error.message], ['request_timeout', 'no answer within 20 ms']);
    return true;
  });
  assert.equal(client.pendingRequests, 0);
  const { id } = await peer.packets.next();
  peer.send({ type: RESPONSE, id }, { type: RESPONSE, id: 77 }, { type: RESPONSE, id: 0 });
  const { id: next } = await roundTrip(client, peer);
  peer.send({ type: RESPONSE, id: next });
  await roundTrip(client, peer);
  assert.equal(client.stats.unmatchedResponses, 4);
  assert.equal(client.stats.requestsTimedOut, 1);
  assert.deepEqual([client.message.length, client.error.length, client.state], [0, 0, 'open']);
});

test('the timeout may come from the options of the client, and 0 waits for ever', async (t) => {
  const { client, peer } = await connected(t, { requestTimeout: 15 });
  const patient = client.request('patient', { timeout: 0 });
  await assert.rejects(client.request('default'), RequestTimeout);
  peer.send({ type: RESPONSE, id: (await peer.packets.next()).id, payload: 'at last' });
  assert.equal((await patient).text, 'at last');
  await assert.rejects(client.request('x', { timeout: -1 }), RangeError);
  await assert.rejects(client.request('x', { timeout: 2 ** 31 }), RangeError);
});

test('a signal gives a request up', async (t) => {
  const { client, peer } = await connected(t);
  const controller = new AbortController();
  const answer = client.request('x', { signal: controller.signal });
  controller.abort(new Error('no more'));
  await assert.rejects(answer, { message: 'no more' });
  await assert.rejects(client.request('never sent', { signal: controller.signal }), { message: 'no more' });
  const { id } = await peer.packets.next();
  peer.send({ type: RESPONSE, id });
  assert.equal((await roundTrip(client, peer)).id, id + 1);
  assert.equal(client.stats.unmatchedResponses, 1);
});

test('ids wrap from 2^32-1 to 1, never 0 (M2)', async (t) => {
  const { client, peer } = await connected(t, { firstId: 0xffffffff });
  const ids = [];
  const pending = [];
  for (const what of ['request', 'request', 'send', 'send']) {
    const result = client[what](what);
    if (what === 'request') pending.push(result.catch((error) => error));
    ids.push((await peer.packets.next()).id);
  }
  assert.deepEqual(ids, [0xffffffff, 1, 2, 3]);
  client.close();
  for (const error of await Promise.all(pending)) assert(error instanceof ConnectionLost);
});

test('a number still pending is passed over when the counter comes round (Q6)', () => {
  assert.equal(nextMessageId(0, new Map()), 1);
  assert.equal(nextMessageId(0xffffffff, new Map()), 1);
  const pending = new Map([[0xffffffff, {}], [1, {}], [2, {}], [4, {}]]);
  assert.equal(nextMessageId(0xfffffffe, pending), 3);
  assert.equal(nextMessageId(3, pending), 5);
});

test("the server's requests are answered: text, bytes, with more beside, with nothing, later (Q1, Q2)", async (t) => {
  const { client, peer } = await connected(t);
  const answers = {
    text: () => 'text',
    bytes: () => new Uint8Array([1, 2]),
    beside: () => ({ payload: 'p', extension: 'e', highPriority: true, routeTag: true }),
    nothing: () => undefined,
    later: () => new Promise((resolve) => setTimeout(resolve, 5, 'later')),
  };
  client.onRequest = (request) => answers[request.text]();
  let id = 50;
  for (const [name, payload] of [['text', 'text'], ['bytes', '\x01\x02'], ['beside', 'p'], ['nothing', ''], ['later', 'later']]) {
    peer.send({ type: REQUEST, id: ++id, bizType: 33, payload: name });
    const answer = await peer.packets.next(name);
    assert.deepEqual([answer.type, answer.id, answer.bizType, text(answer.payload)], [RESPONSE, id, 33, payload]);
    assert.deepEqual([answer.highPriority, answer.routeTag, text(answer.extension)], name === 'beside' ? [true, true, 'e'] : [false, false, '']);
  }
});

test('a request without a handler, or whose handler fails, stays unanswered and is counted', async (t) => {
  const { client, peer } = await connected(t, { maxPayload: 100 });
  peer.send({ type: REQUEST, id: 1, payload: 'nobody' });
  await roundTrip(client, peer);
  assert.equal(client.stats.unansweredRequests, 1);
  client.onRequest = () => { throw new Error('handler'); };
  peer.send({ type: REQUEST, id: 2 });
  assert.equal((await client.error.next()).message, 'handler');
  client.onRequest = async () => new Uint8Array(101);
  peer.send({ type: REQUEST, id: 3 });
  assert((await client.error.next()) instanceof TooLarge);
  assert.equal(client.stats.unansweredRequests, 3);
  assert.equal(client.state, 'open');
  assert.equal((await roundTrip(client, peer)).bizType, 99);
});

// ---- limits of this end ----

test('what is over the own limits is refused and not sent, the limit itself is (L2, L7), and draws no id', async (t) => {
  const { client, peer } = await connected(t, { maxPayload: 100, maxExtension: 10 });
  assert.throws(() => client.send(new Uint8Array(101)), { name: 'TooLarge', code: 'too_large', message: 'the payload is 101 bytes, over the limit of 100' });
  assert.throws(() => client.send('', { extension: new Uint8Array(11) }), TooLarge);
  await assert.rejects(client.request('x'.repeat(101)), TooLarge);
  await assert.rejects(client.request('\u00e9'.repeat(51)), TooLarge); // bytes, not characters
  assert.throws(() => client.send('x', { bizType: 256 }), RangeError);
  client.send(new Uint8Array(100), { extension: new Uint8Array(10) });
  const packet = await peer.packets.next();
  assert.deepEqual([packet.id, packet.payload.length, packet.extension.length], [1, 100, 10]);
});

test('without a connection nothing is sent, and that is said', async (t) => {
  const server = await Server.start(t);
  const client = newClient(t, server.url);
  assert.throws(() => client.send('x'), { name: 'NotConnected', code: 'closed' });
  await assert.rejects(client.request('x'), NotConnected);
  await client.connect();
  client.close();
  assert.throws(() => client.send('x'), NotConnected);
  await assert.rejects(client.connect(), NotConnected); // still closing
  await client.close_.next();
});

// ---- what breaks the protocol ----

async function breaks(t, bad, { message, code = 1002, options = {} }) {
  const { client, peer } = await connected(t, options);
  const pending = client.request('pending');
  pending.catch(() => {});
  await peer.packets.next();
  peer.send({ payload: 'before' });
  if (typeof bad === 'string') peer.sendText(bad);
  else peer.sendBytes(bad);
  peer.send({ payload: 'after' });
  const error = await client.error.next('an error');
  assert(error instanceof ProtocolError);
  if (message instanceof RegExp) assert.match(error.message, message);
  else assert.equal(error.message, message);
  await assert.rejects(pending, ConnectionLost);
  const closed = await client.close_.next('a close');
  assert.deepEqual([closed.code, closed.error, closed.willReconnect], [code, error, false]);
  assert.equal(closed.reason, error.message);
  // Applications in browsers cannot say 1002, so it is 4002.
  const seen = await peer.ended.next('the end');
  assert.equal(seen.code, code + 3000);
  assert(error.message.startsWith(seen.reason) && seen.reason.length > 0);
  // E2: before is delivered, after is not
  assert.equal((await client.message.next()).text, 'before');
  assert.equal(client.message.length, 0);
  assert.equal(client.stats.protocolErrors, 1);
  assert.equal(client.state, 'closed');
}

for (const [name, [wire, message]] of Object.entries(REFUSED)) {
  test(`closes the connection with 1002 (E2): ${name}`, (t) => breaks(t, bytes(wire), { message }));
}

test('a text message closes with 1003 (T2)', (t) => breaks(t, 'hello', { message: 'a text message, but packets are binary messages', code: 1003 }));

test('a payload over the own limit closes with 1002 (L1, L2)', (t) =>
  breaks(t, encodePacket({ type: ONE_WAY, id: 1, payload: new Uint8Array(1001) }), {
    message: 'payload_len is 1001, over the limit of 1000 bytes', options: { maxPayload: 1000 },
  }));

test('an extension header over the own limit closes with 1002', (t) =>
  breaks(t, encodePacket({ type: ONE_WAY, id: 1, extension: 'abc' }), {
    message: 'ext_len is 3, over the limit of 2 bytes', options: { maxExtension: 2 },
  }));

test('the own limit itself is taken', async (t) => {
  const { client, peer } = await connected(t, { maxPayload: 1000, maxExtension: 2 });
  peer.send({ payload: new Uint8Array(1000), extension: 'ab' });
  assert.equal((await client.message.next()).payload.length, 1000);
});

test('where the platform allows it, 1002 itself is said', async (t) => {
  const { client, socket } = await fakeConnected(t);
  socket.onmessage({ data: new ArrayBuffer(3) });
  assert.deepEqual(socket.closes, [[1002, 'a message of 3 bytes, shorter than a header of 16']]);
  assert.equal(client.state, 'closing');
});

// ---- compression ----

const zlib = (payload, more = {}) => ({ compression: 2, payload, ...more });

test('zlib payloads are handed out plain: V12, nothing (C3), large ones; extension headers are never compressed (C1, C2)', async (t) => {
  const { client, peer } = await connected(t);
  peer.sendBytes(V12);
  const message = await client.message.next();
  assert.deepEqual([message.text, message.bizType, message.id], ['hello world', 7, 10]);
  peer.send(zlib(deflateSync(''), { extension: 'plain' }));
  const empty = await client.message.next();
  assert.deepEqual([empty.payload.length, text(empty.extension)], [0, 'plain']);
  const large = randomBytes(100_000).toString('hex');
  peer.send(zlib(deflateSync(large)));
  assert.equal((await client.message.next()).text, large);
  // a request and a response, both compressed (C8)
  client.onRequest = (request) => request.text.toUpperCase();
  peer.send(zlib(deflateSync('ask'), { type: REQUEST, id: 9 }));
  assert.equal(text((await peer.packets.next()).payload), 'ASK');
  const answer = client.request('x');
  peer.send(zlib(deflateSync('answer'), { type: RESPONSE, id: (await peer.packets.next()).id }));
  assert.equal((await answer).text, 'answer');
});

test('order holds though decompressing takes its time, also before the end of the connection', async (t) => {
  const { client, peer } = await connected(t);
  for (let i = 0; i < 20; i++) peer.send(i % 3 ? { payload: `${i}` } : zlib(deflateSync(`${i}`)));
  const answer = client.request('x');
  peer.send(zlib(deflateSync('in time'), { type: RESPONSE, id: (await peer.packets.next()).id }));
  peer.close(1000, 'done');
  for (let i = 0; i < 20; i++) assert.equal((await client.message.next()).text, `${i}`);
  assert.equal((await answer).text, 'in time');
  assert.equal((await client.close_.next()).reason, 'done');
});

test('the decompressed limit itself is allowed, and is enforced while decompressing (L1, L2, L5)', async (t) => {
  const { client, peer } = await connected(t, { maxDecompressed: 1000 });
  peer.send(zlib(deflateSync(new Uint8Array(1000))));
  assert.equal((await client.message.next()).payload.length, 1000);
  peer.send(zlib(deflateSync(new Uint8Array(1001))));
  assert.equal((await client.error.next()).message, 'payload (zlib) decompresses to more than the limit of 1000 bytes');
});

test('a bomb is not unpacked', (t) =>
  breaks(t, encodePacket({ type: ONE_WAY, id: 1, ...zlib(deflateSync(new Uint8Array(LIMIT + 1))) }), {
    message: `payload (zlib) decompresses to more than the limit of ${LIMIT} bytes`,
  }));

const good = deflateSync('hello world, hello world');
const BAD_ZLIB = {
  'cut short (C4)': good.subarray(0, -1),
  'cut in the middle (C4)': good.subarray(0, 8),
  'only its header (C4)': good.subarray(0, 2),
  'damaged: checksum (C4, C7)': Buffer.concat([good.subarray(0, -1), Buffer.from([good.at(-1) ^ 1])]),
  'damaged: data (C4)': Buffer.concat([good.subarray(0, 4), Buffer.from([good[4] ^ 0xff]), good.subarray(5)]),
  'followed by a byte (C4, C6)': Buffer.concat([good, Buffer.from([0])]),
  'followed by its own checksum again (C4)': Buffer.concat([good, good.subarray(-4)]),
  'two streams (C6)': Buffer.concat([good, good]),
  'raw deflate (C7)': deflateRawSync('hello world'),
  'gzip (C7)': gzipSync('hello world'),
  'nothing (C5)': Buffer.alloc(0),
  'a dictionary is needed (C4)': deflateSync('hello world', { dictionary: Buffer.from('hello') }),
  'garbage (C4)': Buffer.from('no stream at all'),
};
for (const [name, payload] of Object.entries(BAD_ZLIB)) {
  test(`zlib, ${name}`, (t) =>
    breaks(t, encodePacket({ type: ONE_WAY, id: 1, ...zlib(payload) }), { message: /^payload \(zlib\) does not decompress: ./ }));
}

test('zstd is beyond this client, which it says, with 1003; X7 as well', async (t) => {
  for (const wire of [VECTORS.V11[0], '01010000 00000001 0000 00000000 0000']) {
    await breaks(t, bytes(wire), { message: 'payload (zstd) cannot be decompressed by this client', code: 1003 });
  }
});

test('so is zlib without DecompressionStream', async (t) => {
  const { DecompressionStream } = globalThis;
  globalThis.DecompressionStream = undefined;
  try {
    await breaks(t, V12, { message: 'payload (zlib) cannot be decompressed by this client', code: 1003 });
  } finally {
    globalThis.DecompressionStream = DecompressionStream;
  }
});

// ---- the end of a connection ----

test('all pending requests fail at once when the connection ends (Q4)', async (t) => {
  for (const end of [(client, peer) => peer.cut(), (client, peer) => peer.close(1001, 'going'), (client) => client.close()]) {
    const { client, peer } = await connected(t);
    const answers = [client.request('a'), client.request('b', { timeout: 0 })].map((a) => a.catch((error) => error));
    await peer.packets.next();
    await peer.packets.next();
    assert.equal(client.pendingRequests, 2);
    end(client, peer);
    for (const error of await Promise.all(answers)) {
      assert(error instanceof ConnectionLost);
      assert.equal(error.code, 'connection_lost');
    }
    assert.equal(client.pendingRequests, 0);
  }
});

test("the server's close is told with its code and reason; being cut off is 1006", async (t) => {
  const { client, peer } = await connected(t);
  peer.close(4001, 'because \u00fc');
  assert.deepEqual(await client.close_.next(), { code: 4001, reason: 'because \u00fc', error: undefined, willReconnect: false });
  const other = await connected(t);
  other.peer.cut();
  assert.equal((await other.client.close_.next()).code, 1006);
  assert.equal(other.client.state, 'closed');
});

test('the own close arrives, with its code and reason, and what was sent before it', async (t) => {
  const { client, peer } = await connected(t);
  client.send('last words');
  client.close(4321, 'bye');
  assert.equal(client.state, 'closing');
  client.close();
  assert.equal(text((await peer.packets.next()).payload), 'last words');
  assert.deepEqual(await peer.ended.next(), { code: 4321, reason: 'bye' });
  assert.deepEqual(await client.close_.next(), { code: 4321, reason: 'bye', error: undefined, willReconnect: false });
  assert.equal(client.close_.length, 0);
  assert.throws(() => client.close(1002), RangeError);
  assert.throws(() => client.close(1000, 'x'.repeat(124)), RangeError);
});

test('after close no message is handed out, and what was pending has failed, before the peer has agreed', async (t) => {
  const { client, socket } = await fakeConnected(t);
  const pending = client.request('x');
  client.close();
  await assert.rejects(pending, ConnectionLost);
  assert.equal(client.state, 'closing');
  socket.receive({ payload: 'too late' });
  assert.equal(client.message.length, 0);
});

test('a peer that does not agree to a close is not waited for longer than closeTimeout', async (t) => {
  const { client, peer } = await connected(t, { closeTimeout: 20 });
  peer.answerClose = false;
  client.close();
  assert.equal((await client.close_.next()).code, 1000);
  assert.equal(client.state, 'closed');
  peer.cut();
});

// ---- connecting ----

test('connect fails where nobody listens, where there is no WebSocket, and with a URL that is none', async (t) => {
  const server = await Server.start(t);
  const { url } = server;
  await server.stop();
  const client = newClient(t, url);
  await assert.rejects(client.connect(), NotConnected);
  assert.equal(client.state, 'closed');
  assert.equal(client.reconnecting.length, 0); // off by default
  assert.equal((await client.close_.next()).code, 1006);

  const plain = http.createServer((_, response) => response.end('no')).listen(0, '127.0.0.1');
  t.after(() => plain.close());
  await new Promise((resolve) => plain.once('listening', resolve));
  await assert.rejects(newClient(t, `ws://127.0.0.1:${plain.address().port}/`).connect(), NotConnected);
  await assert.rejects(newClient(t, 'nonsense', { reconnect: true }).connect());
});

test('connecting takes no longer than connectTimeout', async (t) => {
  const client = newClient(t, 'ws://fake/', { WebSocket: FakeWebSocket, connectTimeout: 15 });
  await assert.rejects(client.connect(), /not connected within 15 ms/);
  const socket = FakeWebSocket.next();
  assert.equal(socket.closes.length, 1);
  socket.onopen({}); // too late
  socket.onclose({ code: 1006, reason: '' });
  assert.equal(client.state, 'closed');
  assert.equal(client.open.length, 0);
});

test('a failure to connect that is told by an error event alone is enough', async (t) => {
  const client = newClient(t, 'ws://fake/', { WebSocket: FakeWebSocket, connectTimeout: 0 });
  const opening = client.connect();
  FakeWebSocket.next().onerror({});
  await assert.rejects(opening, NotConnected);
  assert.equal(client.state, 'closed');
});

test('connecting twice is connecting once, and a client may connect again after its end', async (t) => {
  const server = await Server.start(t);
  const client = newClient(t, server.url);
  await Promise.all([client.connect(), client.connect()]);
  await client.connect();
  const peer = await server.peers.next();
  assert.equal(server.peers.length, 0);
  assert.deepEqual(await client.open.next(), { reconnected: false });
  peer.close(1000, '');
  await client.close_.next();
  await client.connect();
  assert.deepEqual(await client.open.next(), { reconnected: true });
});

test('closed while it connects, connect fails', async (t) => {
  const server = await Server.start(t);
  const client = newClient(t, server.url);
  const opening = client.connect();
  client.close();
  await assert.rejects(opening, NotConnected);
  await client.close_.next();
  assert.equal(client.open.length, 0);
});

// ---- reconnecting ----

test('the delays: 100 ms x 1.6 up to 30 s, 20 % more or less', () => {
  const middle = [1, 2, 3, 4, 12, 13, 14, 1000].map((n) => Math.round(backoff(n, {}, () => 0.5)));
  assert.deepEqual(middle, [100, 160, 256, 410, 17592, 28147, 30000, 30000]);
  assert.equal(backoff(1, {}, () => 0), 80);
  assert(Math.abs(backoff(1, {}, () => 1) - 120) < 1e-9);
  assert.equal(backoff(1000, {}, () => 0), 24000);
  for (let i = 0; i < 1000; i++) {
    const delay = backoff(2);
    assert(delay >= 128 && delay <= 192, `${delay}`);
  }
  assert.equal(backoff(3, { initial: 1, factor: 2, max: 3, jitter: 0 }), 3);
});

const FAST = { initial: 5, factor: 1.5, max: 20 };

test('it reconnects; pending requests fail and are never sent again; ids start again (M7)', async (t) => {
  const { client, server, peer } = await connected(t, { reconnect: FAST });
  await client.open.next();
  await roundTrip(client, peer);
  const pending = client.request('pending').catch((error) => error);
  await peer.packets.next();
  peer.cut();
  assert((await pending) instanceof ConnectionLost);
  assert.deepEqual(await client.close_.next(), { code: 1006, reason: '', error: undefined, willReconnect: true });
  const { attempt, delay } = await client.reconnecting.next();
  assert.equal(attempt, 1);
  assert(delay >= 4 && delay <= 6);
  assert.equal(client.state, 'waiting');
  assert.throws(() => client.send('x'), NotConnected);
  const again = await server.peers.next();
  assert.deepEqual(await client.open.next(), { reconnected: true });
  const first = await roundTrip(client, again);
  assert.deepEqual([first.id, text(first.payload)], [1, 'round trip']);
  assert.equal(again.packets.length, 0);
  assert.equal(client.stats.reconnects, 1);
});

test('an answer meant for the old connection is not given on the new one', async (t) => {
  const { client, server, peer } = await connected(t, { reconnect: FAST });
  let answer;
  client.onRequest = () => new Promise((resolve) => (answer = resolve));
  peer.send({ type: REQUEST, id: 1 });
  await roundTrip(client, peer);
  peer.cut();
  const again = await server.peers.next();
  while (client.state !== 'open') await client.open.next();
  answer('late');
  assert((await client.error.next()) instanceof NotConnected);
  assert.equal((await roundTrip(client, again)).type, REQUEST);
});

test('it reconnects after a protocol error too, and goes on trying until the server is back', async (t) => {
  const { client, server, peer } = await connected(t, { reconnect: FAST });
  peer.sendText('no packet');
  assert.equal((await client.close_.next()).code, 1003);
  await server.peers.next();
  assert.equal((await client.reconnecting.next()).attempt, 1);
  while (client.state !== 'open') await client.open.next();
  const { port } = server;
  await server.stop();
  for (let attempt = 2; attempt <= 5; attempt++) {
    // the connection between brought nothing, so it counts as no success
    assert.equal((await client.reconnecting.next()).attempt, attempt);
  }
  const back = await Server.start(t, port);
  const newPeer = await back.peers.next();
  while (client.state !== 'open') await client.open.next();
  await roundTrip(client, newPeer);
  // now it was a success: the delays begin again, whatever failed between
  client.reconnecting = new Queue(5000);
  newPeer.cut();
  assert.equal((await client.reconnecting.next()).attempt, 1);
});

test('connect with reconnect waits for a server that comes later; close ends that', async (t) => {
  const server = await Server.start(t);
  const { port, url } = server;
  await server.stop();
  const client = newClient(t, url, { reconnect: FAST });
  const opening = client.connect();
  await client.reconnecting.next();
  await client.reconnecting.next();
  assert.equal(client.close_.length, 0);
  await Server.start(t, port);
  await opening;
  assert.deepEqual(await client.open.next(), { reconnected: false });

  const hopeless = newClient(t, url.replace(`${port}`, '1'), { reconnect: { ...FAST, initial: 10_000, max: 10_000 } });
  const never = hopeless.connect();
  await hopeless.reconnecting.next();
  hopeless.close();
  await assert.rejects(never, NotConnected);
  assert.equal(hopeless.state, 'closed');
  assert.equal((await hopeless.close_.next()).willReconnect, false);
});

test('connect goes on at once instead of waiting, and joins an attempt that is under way', async (t) => {
  const { client, socket } = await fakeConnected(t, { reconnect: { initial: 10_000, max: 10_000 } });
  socket.onclose({ code: 1006, reason: '' });
  assert.equal(client.state, 'waiting');
  const first = client.connect();
  assert.equal(client.state, 'connecting');
  const second = FakeWebSocket.next();
  assert.notEqual(second, socket);
  second.onopen({});
  await first;
  second.onclose({ code: 1006, reason: '' });

  const quick = await fakeConnected(t, { reconnect: FAST });
  quick.socket.onclose({ code: 1006, reason: '' });
  while (FakeWebSocket.next() === quick.socket) await new Promise((resolve) => setTimeout(resolve, 1));
  const third = FakeWebSocket.next();
  const joined = quick.client.connect();
  assert.equal(FakeWebSocket.next(), third);
  third.onopen({});
  await joined;
  third.onclose({ code: 1006, reason: '' });
  client.close();
  quick.client.close();
});

test('it gives up after as many attempts in a row as it may', async (t) => {
  const server = await Server.start(t);
  const { url } = server;
  await server.stop();
  const client = newClient(t, url, { reconnect: { ...FAST, attempts: 2 } });
  await assert.rejects(client.connect(), NotConnected);
  assert.deepEqual([(await client.reconnecting.next()).attempt, (await client.reconnecting.next()).attempt], [1, 2]);
  assert.equal(client.reconnecting.length, 0);
  assert.equal((await client.close_.next()).willReconnect, false);
});

test('the own close is final, also with reconnect', async (t) => {
  const { client, server } = await connected(t, { reconnect: FAST });
  client.close();
  assert.equal((await client.close_.next()).willReconnect, false);
  await new Promise((resolve) => setTimeout(resolve, 40));
  assert.deepEqual([client.state, server.peers.length, client.reconnecting.length], ['closed', 0, 0]);
});

// ---- backpressure ----

test('send says what waits, and false when there is no room; request says would_block; answers always go', async (t) => {
  const { client, socket } = await fakeConnected(t, { maxBuffered: 100 });
  client.onRequest = () => 'x'.repeat(200);
  assert.equal(client.send(new Uint8Array(34)), 50);
  assert.equal(client.bufferedAmount, 50);
  assert.equal(client.send(new Uint8Array(35)), false); // the bound counts the packet being added
  assert.equal(client.send(new Uint8Array(34)), 100);
  assert.equal(client.send(''), false);
  await assert.rejects(client.request(''), (error) => error instanceof WouldBlock && error.code === 'would_block');
  assert.equal(client.pendingRequests, 0);
  socket.receive({ type: REQUEST, id: 7 });
  await new Promise(setImmediate);
  assert.deepEqual(socket.sent.map((p) => [p.type, p.id]), [[ONE_WAY, 1], [ONE_WAY, 2], [RESPONSE, 7]]);

  let drained = 0;
  const waiting = client.drained().then(() => drained++);
  socket.bufferedAmount = 51;
  await new Promise((resolve) => setTimeout(resolve, 20));
  assert.equal(drained, 0);
  socket.bufferedAmount = 50;
  await waiting;
  socket.bufferedAmount = 0;
  await client.drained();
  assert.equal(client.send(new Uint8Array(500)), 516); // more than the bound, and nothing else waits
  socket.bufferedAmount = 0;
  socket.writesAtOnce = true; // some have written all when send returns; still it is no false
  assert.equal(client.send('x'), 17);
});

test('drained also ends with the connection', async (t) => {
  const { client, socket } = await fakeConnected(t, { maxBuffered: 10 });
  client.send('x');
  const drained = client.drained();
  client.close();
  socket.onclose({ code: 1000, reason: '' });
  await drained;
});

// ---- the rest ----

test('listeners: any number, removable, and one that throws disturbs nothing', async (t) => {
  const { client, socket } = await fakeConnected(t);
  const heard = [];
  const { queueMicrotask } = globalThis;
  const thrown = [];
  globalThis.queueMicrotask = (f) => {
    try { f(); } catch (error) { thrown.push(error.message); }
  };
  try {
    client.on('message', () => { throw new Error('listener'); });
    const off = client.on('message', (message) => heard.push(`1 ${message.text}`));
    client.on('message', (message) => heard.push(`2 ${message.text}`));
    socket.receive({ payload: 'a' });
    off();
    off();
    socket.receive({ payload: 'b' });
  } finally {
    globalThis.queueMicrotask = queueMicrotask;
  }
  assert.deepEqual(heard, ['1 a', '2 a', '2 b']);
  assert.deepEqual(thrown, ['listener', 'listener']);
  assert.equal(client.state, 'open');
});

test('options that are not allowed are refused by name', () => {
  const make = (options) => () => new Client('ws://fake/', { WebSocket: FakeWebSocket, ...options });
  for (const name of ['maxPayload', 'maxDecompressed', 'maxExtension', 'maxBuffered', 'requestTimeout', 'connectTimeout', 'closeTimeout', 'firstId']) {
    for (const bad of [-1, 1.5, NaN, 2 ** 60, '1', null]) assert.throws(make({ [name]: bad }), (error) => error instanceof RangeError && error.message.startsWith(name));
  }
  for (const bad of [{ initial: 0 }, { factor: 0.5 }, { max: 1 }, { jitter: 2 }, { attempts: 0 }]) {
    assert.throws(make({ reconnect: bad }), /^RangeError: reconnect/);
  }
  make({ maxPayload: undefined, reconnect: { max: undefined } })();
  assert.equal(new Client(new URL('ws://fake/x'), { WebSocket: FakeWebSocket }).url, 'ws://fake/x');
});

test('without a WebSocket that is said at once', () => {
  const { WebSocket } = globalThis;
  Object.defineProperty(globalThis, 'WebSocket', { value: undefined, configurable: true, writable: true });
  try {
    assert.throws(() => new Client('ws://fake/'), /there is no WebSocket here/);
  } finally {
    Object.defineProperty(globalThis, 'WebSocket', { value: WebSocket, configurable: true, writable: true });
  }
});
