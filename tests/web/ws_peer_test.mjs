// SPDX-License-Identifier: Apache-2.0
// The tool over WebSocket, with TLS and without, against the npm package ws, as the client of `msgtrans serve` and as
// the server of `msgtrans send`: what transports_test.py has of Python's library.
//
//   node tests/web/ws_peer_test.mjs TOOL
//
// Needs ws, found from MSGTRANS_NODE_MODULES (a directory with node_modules in it; else the current one). Exits with 77
// where it is missing.
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import https from 'node:https';
import { createRequire } from 'node:module';
import os from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';

import { Client, decodePacket, encodePacket } from '../../examples/web/msgtrans.js';
import { Queue, within } from './waiting.mjs';

const [tool] = process.argv.slice(2);
if (!tool) {
  console.error('ws_peer_test.mjs TOOL');
  process.exit(2);
}
const require = createRequire(path.join(path.resolve(process.env.MSGTRANS_NODE_MODULES ?? '.'), 'here.js'));
let WebSocket;
try {
  WebSocket = require('ws');
} catch {
  console.log('skipped: ws is not installed');
  process.exit(77);
}

const [ONE_WAY, REQUEST, RESPONSE] = [0, 1, 2];
const MIB = 1024 * 1024;
// the ends of the lengths of frames, and those of packets in them
const SIZES = [0, 1, 109, 110, 125, 126, 65519, 65520, 65535, 65536, 100_000, MIB - 16, MIB - 1, MIB];
const LIMIT = 16 * MIB;

// ---- the tool ----

/** A process of the tool; `out` and `err` are what it has printed. */
class Tool {
  out = '';
  err = '';
  constructor(t, ...args) {
    this.process = spawn(path.resolve(tool), args, { stdio: 'pipe' });
    this.process.stdin.on('error', () => {}); // it may have ended
    this.printed = new Queue();
    for (const [name, pipe] of [['out', this.process.stdout], ['err', this.process.stderr]]) {
      pipe.setEncoding('utf8').on('data', (text) => {
        this[name] += text;
        this.printed.push(text);
      });
    }
    this.ended = new Promise((resolve, reject) => {
      this.process.once('error', reject);
      this.process.once('close', (status, signal) => {
        this.over = true;
        this.printed.push('');
        resolve(signal ?? status);
      });
    });
    this.ended.catch(() => {});
    t.after(() => this.process.kill('SIGKILL'));
  }
  async until(what, pattern) {
    for (;;) {
      const found = pattern.exec(this.out) ?? pattern.exec(this.err);
      if (found) return found;
      assert(!this.over, `it ended without saying ${what}, but: ${this.out}${this.err}`);
      await this.printed.next(`${what}; it printed ${this.out}${this.err}`);
    }
  }
  status() {
    return within('the end of the tool', this.ended);
  }
}

/** `msgtrans send`, to its end. */
async function send(t, url, { args = [], input = '' } = {}) {
  const sender = new Tool(t, 'send', url, '--ca', certificate, ...args);
  sender.process.stdin.end(input);
  return { status: await sender.status(), out: sender.out, err: sender.err };
}

/** `msgtrans serve` on a free port of each scheme. */
async function serve(t, ...args) {
  const server = new Tool(
    t, 'serve', '--shards', '2', '--json', '--verbose', '--ws', '127.0.0.1:0/chat', '--wss', '127.0.0.1:0/chat',
    '--cert', certificate, '--key', key, ...args,
  );
  for (const scheme of ['ws', 'wss']) {
    const [, at] = await server.until(`${scheme} listens`, new RegExp(`^listening ${scheme} (\\S+)$`, 'm'));
    server[scheme] = `${scheme}://${at}`;
  }
  server.stop = async () => {
    server.process.kill('SIGTERM');
    assert.equal(await server.status(), 0, server.err);
    return JSON.parse(server.out.split('\n').at(-2));
  };
  return server;
}

let directory, certificate, key;
before(async () => {
  directory = mkdtempSync(path.join(os.tmpdir(), 'msgtrans-'));
  [certificate, key] = ['cert.pem', 'key.pem'].map((name) => path.join(directory, name));
  const made = new Tool({ after() {} }, 'cert', '--cert', certificate, '--key', key);
  assert.equal(await made.status(), 0, made.err);
});
after(() => rmSync(directory, { recursive: true, force: true }));

// ---- the peer ----

/** One end of a connection, of ws. */
class Peer {
  messages = new Queue();
  pongs = new Queue();
  pings = new Queue();
  constructor(t, socket) {
    this.socket = socket;
    socket.on('message', (data, isBinary) => this.messages.push({ data, isBinary }));
    socket.on('pong', (data) => this.pongs.push(data.toString()));
    socket.on('ping', (data) => this.pings.push(data.toString()));
    socket.on('error', (error) => (this.error = error));
    this.closed = new Promise((resolve) =>
      socket.on('close', (code, reason) => resolve({ code, reason: reason.toString() })),
    );
    t.after(() => socket.terminate());
  }
  /** A connection to a server. */
  static async connect(t, url, protocols = ['msgtrans'], options = {}) {
    const trust = url.startsWith('wss') ? { ca: readFileSync(certificate) } : {};
    const peer = new Peer(t, new WebSocket(url, protocols, { ...trust, ...options }));
    const opened = new Promise((resolve, reject) => peer.socket.once('open', resolve).once('error', reject));
    await within(`a connection to ${url}`, opened);
    return peer;
  }
  send(data, options = {}) {
    return within('room to send', new Promise((resolve, reject) => {
      const done = (error) => (error ? reject(error) : resolve());
      this.socket.send(data, { binary: typeof data !== 'string', ...options }, done);
    }));
  }
  async packet() {
    const { data, isBinary } = await this.messages.next('a packet');
    assert(isBinary, `a text message: ${data}`);
    return decodePacket(new Uint8Array(data));
  }
  async ping(text) {
    this.socket.ping(text);
    assert.equal(await this.pongs.next(`a pong of ${text}`), text);
  }
  /** In frames of these sizes and a last one with the rest, each but the last followed by a ping that is answered. */
  async sendInFrames(data, sizes) {
    let at = 0;
    for (const size of sizes) {
      await this.send(data.subarray(at, (at += size)), { fin: false });
      await this.ping(`after ${at} bytes`);
    }
    await this.send(data.subarray(at), { fin: true });
  }
  end() {
    return within('the end of the connection', this.closed);
  }
}

function pattern(size) {
  const bytes = Buffer.alloc(size);
  for (let i = 0; i < size; i++) bytes[i] = (i * 7 + (i >> 8)) & 255;
  return bytes;
}

/** The bytes are told from others without printing a megabyte. */
function assertSame(got, wanted, what) {
  assert.equal(got.length, wanted.length, what);
  assert(Buffer.compare(got, wanted) === 0, `other bytes: ${what}`);
}

const version2 = () => {
  const packet = encodePacket({ type: REQUEST, id: 1, payload: 'x' });
  packet[0] = 2;
  return packet;
};

/** Each test for both schemes. */
function testBoth(name, body) {
  for (const scheme of ['ws', 'wss']) test(`${scheme}: ${name}`, { timeout: 60_000 }, (t) => body(t, scheme));
}

// ---- ws is the client ----

testBoth('packets of all sizes come back', async (t, scheme) => {
  const server = await serve(t);
  const peer = await Peer.connect(t, server[scheme]);
  assert.equal(peer.socket.protocol, 'msgtrans');
  assert.equal(peer.socket.extensions, ''); // it offers permessage-deflate
  for (const size of SIZES) {
    const payload = pattern(size);
    const fields = { id: size + 1, bizType: 9, payload };
    await peer.send(encodePacket({ ...fields, type: REQUEST }));
    const { data, isBinary } = await peer.messages.next(`the answer of ${size} bytes`);
    assert(isBinary);
    assertSame(data, encodePacket({ ...fields, type: RESPONSE }), `the answer of ${size} bytes`);
    await peer.send(encodePacket({ ...fields, type: ONE_WAY }));
    const back = await peer.packet();
    assert.equal(back.type, ONE_WAY);
    assertSame(back.payload, payload, `one-way, ${size} bytes`);
  }
  // many at once, in order
  for (let id = 1; id <= 1000; id++) peer.socket.send(encodePacket({ type: REQUEST, id, payload: `${id}` }));
  for (let id = 1; id <= 1000; id++) assert.equal((await peer.packet()).id, id);
  peer.socket.close(1000);
  await peer.end();
  const summary = await server.stop();
  assert.equal(summary.protocol_errors + summary.handshake_failures, 0);
});

testBoth('a message in fragments is whole, and pings between them are answered', async (t, scheme) => {
  const server = await serve(t);
  const peer = await Peer.connect(t, server[scheme]);
  const payload = pattern(1000);
  const packet = encodePacket({ type: REQUEST, id: 7, payload });
  for (const sizes of [[100, 100, 100], [0, 0], [1, 14], [16, 0, 999], [1016], Array(200).fill(5)]) {
    await peer.sendInFrames(packet, sizes);
    assertSame((await peer.packet()).payload, payload, `in frames of ${sizes}`);
  }
  const large = encodePacket({ type: REQUEST, id: 8, payload: pattern(MIB) });
  await peer.sendInFrames(large, Array(15).fill(65536));
  assertSame((await peer.packet()).payload, pattern(MIB), 'a MiB in frames');
  for (const text of ['', 'x', 'y'.repeat(125)]) await peer.ping(text);
  peer.socket.pong('unasked');
  await peer.ping('and that did no harm');
  assert.equal(peer.messages.length, 0);
});

testBoth('the JavaScript client works on it', async (t, scheme) => {
  const server = await serve(t);
  class Trusting extends WebSocket {
    constructor(url, protocols) {
      super(url, protocols, { ca: readFileSync(certificate) });
    }
  }
  const client = new Client(server[scheme], { WebSocket: Trusting });
  t.after(() => client.close());
  const messages = new Queue(), closes = new Queue();
  client.on('message', (message) => messages.push(message));
  client.on('close', (event) => closes.push(event));
  await within('a connection', client.connect());
  for (const size of SIZES) {
    const payload = pattern(size);
    const answer = await client.request(payload, { bizType: 3 });
    assert.equal(answer.bizType, 3);
    assertSame(answer.payload, payload, `${size} bytes`);
    assert(client.send(payload) > 0);
    assertSame((await messages.next(`the message of ${size} bytes`)).payload, payload, `one-way, ${size} bytes`);
  }
  const texts = Array.from({ length: 100 }, (_, i) => `request ${i}`);
  const answers = await Promise.all(texts.map((text) => client.request(text)));
  assert.deepEqual(answers.map((answer) => answer.text), texts);
  client.close(4001, 'gone home');
  assert.equal((await closes.next('the close')).code, 4001);
  await server.until('the reason at the server', /WebSocket code 4001: gone home/);
  assert.equal(client.stats.protocolErrors, 0);
});

testBoth('what is against the protocol is closed with its code', async (t, scheme) => {
  const server = await serve(t, '--max-message', '100000');
  const packet = (size) => encodePacket({ type: REQUEST, id: 1, payload: pattern(size) });
  const bystander = await Peer.connect(t, server[scheme]);
  let refused = 0;
  const closes = async (code, reason, hurt) => {
    const peer = await Peer.connect(t, server[scheme]);
    await peer.send(packet(10)); // what came before is served
    assert.equal((await peer.packet()).payload.length, 10);
    await hurt(peer);
    const end = await peer.end();
    assert.equal(end.code, code, end.reason);
    assert.match(end.reason, reason);
    assert.equal(peer.messages.length, 0);
    refused++;
    await bystander.send(packet(100_000));
    assertSame((await bystander.packet()).payload, pattern(100_000), 'to somebody else');
  };
  await closes(1003, /text/, (peer) => peer.send('text'));
  await closes(1003, /text/, (peer) => peer.send(''));
  await closes(1003, /text/, (peer) => peer.send('te', { fin: false }));
  await closes(1009, /100001/, (peer) => peer.send(packet(100_001)));
  await closes(1009, /200016/, (peer) => peer.send(packet(200_000)));
  // ws gives up when it cannot send, and would not see the Close: the rest is read, though for nothing
  await closes(1009, /limit/, (peer) => peer.send(packet(8 * MIB)));
  await closes(1002, /version is 2/, (peer) => peer.send(version2()));
  await closes(1002, /./, (peer) => peer.send(Buffer.concat([packet(1), Buffer.from('more')])));
  await closes(1002, /./, (peer) => peer.send(packet(1).subarray(0, 16)));
  await closes(1002, /./, (peer) => peer.send(packet(1).subarray(0, 15)));
  await closes(1002, /./, (peer) => peer.send(Buffer.alloc(0)));
  bystander.socket.close(1000);
  await bystander.end();
  const summary = await server.stop();
  assert.equal(summary.protocol_errors, refused);
  assert.equal(summary.handshake_failures, 0);
});

testBoth('a close is answered with its code, and told with its reason', async (t, scheme) => {
  const server = await serve(t);
  for (const code of [1000, 1001, 1003, 1007, 1008, 1009, 1011, 3000, 4000, 4999]) {
    const peer = await Peer.connect(t, server[scheme]);
    peer.socket.close(code, `reason of ${code}`);
    assert.equal((await peer.end()).code, code);
    await server.until('the reason', new RegExp(`WebSocket code ${code}: reason of ${code}$`, 'm'));
  }
  const peer = await Peer.connect(t, server[scheme]);
  peer.socket.close();
  assert.equal((await peer.end()).code, 1005);
  await server.until('that there was none', /WebSocket code none$/m);
  const cut = await Peer.connect(t, server[scheme]);
  cut.socket.terminate();
  await server.until('that it was cut', /ended: .*(ended without a Close frame|ended without its saying so|reset)/i);
  assert.equal((await server.stop()).protocol_errors, 0);
});

testBoth('a server that stops says 1001', async (t, scheme) => {
  const server = await serve(t);
  const peers = await Promise.all(Array.from({ length: 5 }, () => Peer.connect(t, server[scheme])));
  for (const peer of peers) await peer.ping('it serves me');
  const stopped = server.stop();
  for (const peer of peers) assert.equal((await peer.end()).code, 1001);
  assert.equal((await stopped).sessions, 5);
});

testBoth('a handshake that does not fit fails with its status', async (t, scheme) => {
  const server = await serve(t);
  const elsewhere = server[scheme].replace('/chat', '/elsewhere');
  await assert.rejects(Peer.connect(t, elsewhere), /Unexpected server response: 404/);
  await assert.rejects(Peer.connect(t, server[scheme], ['other']), /no subprotocol/);
  for (const [protocols, chosen] of [[[], ''], [['other', 'msgtrans'], 'msgtrans']]) {
    assert.equal((await Peer.connect(t, server[scheme], protocols)).socket.protocol, chosen);
  }
  if (scheme === 'wss') {
    await assert.rejects(Peer.connect(t, server.wss, [], { ca: undefined }), /self-signed certificate/);
    await assert.rejects(Peer.connect(t, server.wss, [], { servername: 'elsewhere.example' }), /does not match/);
    for (const version of ['TLSv1.2', 'TLSv1.3']) {
      const peer = await Peer.connect(t, server.wss, [], { minVersion: version, maxVersion: version });
      await peer.ping(version);
    }
  }
});

// ---- ws is the server ----

/** Hands each connection to `serve`; counts on `peers`. */
async function listen(t, scheme, options = {}) {
  const secure = scheme === 'wss' && https.createServer({ cert: readFileSync(certificate), key: readFileSync(key) });
  const server = new WebSocket.Server({
    ...(secure ? { server: secure } : { host: '127.0.0.1', port: 0 }), maxPayload: 2 * LIMIT, perMessageDeflate: true,
    ...options,
  });
  const peers = new Queue();
  server.on('connection', (socket, request) => {
    const peer = new Peer(t, socket);
    peer.offered = request.headers;
    peers.push(peer);
  });
  if (secure) secure.listen(0, '127.0.0.1');
  const listening = secure || server;
  await within('it listens', new Promise((resolve) => listening.once('listening', resolve)));
  t.after(() => {
    server.close();
    if (secure) secure.close();
  });
  return { peers, url: `${scheme}://localhost:${listening.address().port}/a/path?query` };
}

/** What `msgtrans send` does with a server that does `serve` with the connection. */
async function against(t, scheme, options, serveOne) {
  const { peers, url } = await listen(t, scheme);
  const [sent] = await Promise.all([
    send(t, url, options),
    (async () => serveOne(await peers.next('the connection of our client')))(),
  ]);
  return sent;
}

const answerTo = (packet, fields = {}) =>
  encodePacket({ type: packet.type === REQUEST ? RESPONSE : ONE_WAY, id: packet.id, bizType: packet.bizType, payload: packet.payload, ...fields });

testBoth('as a server it understands our client', async (t, scheme) => {
  const lines = ['hello', '', 'x'.repeat(125), 'y'.repeat(70_000), 'z'.repeat(MIB), 'ü'];
  for (const request of [true, false]) {
    const sent = await against(
      t, scheme, { args: request ? ['--request', '--biz', '7'] : ['--biz', '7'], input: lines.join('\n') + '\n' },
      async (peer) => {
        assert.equal(peer.offered['sec-websocket-protocol'], 'msgtrans');
        assert.equal(peer.offered['sec-websocket-extensions'], undefined);
        assert.equal(peer.socket.protocol, 'msgtrans');
        for (const line of lines) {
          const packet = await peer.packet();
          assert.deepEqual([packet.type, packet.bizType], [request ? REQUEST : ONE_WAY, 7]);
          assertSame(packet.payload, Buffer.from(line), 'a line');
          await peer.ping(line.slice(0, 100));
          await peer.send(answerTo(packet));
        }
        assert.deepEqual(await peer.end(), { code: 1000, reason: '' });
      },
    );
    assert.deepEqual([sent.status, sent.err], [0, '']);
    assertSame(Buffer.from(sent.out), Buffer.from(lines.join('\n') + '\n'), 'what was printed');
  }
});

testBoth('as a server it may answer in fragments', async (t, scheme) => {
  const sent = await against(t, scheme, { args: ['--request', 'in pieces'] }, async (peer) => {
    const packet = await peer.packet();
    await peer.sendInFrames(answerTo(packet, { payload: 'a'.repeat(MIB) }), [0, 1, 15, 100, 65536, 65536]);
    assert.equal((await peer.end()).code, 1000);
  });
  assert.deepEqual([sent.status, sent.err], [0, '']);
  assert.equal(sent.out, 'a'.repeat(MIB) + '\n');
});

testBoth('our client refuses what is against the protocol, with its code', async (t, scheme) => {
  for (const [code, reason, said, hurt] of [
    [1003, /text/, /text/, (peer) => peer.send('text')],
    [1002, /version is 2/, /version is 2/, (peer) => peer.send(version2())],
    [1002, /./, /./, (peer, packet) => peer.send(Buffer.concat([answerTo(packet), Buffer.from('more')]))],
    [1009, /16777217/, /16777217/, (peer, packet) => peer.send(answerTo(packet, { payload: Buffer.alloc(LIMIT + 1) }))],
  ]) {
    const sent = await against(t, scheme, { args: ['--request', 'hello'] }, async (peer) => {
      await hurt(peer, await peer.packet());
      const end = await peer.end();
      assert.equal(end.code, code, end.reason);
      assert.match(end.reason, reason);
    });
    assert.equal(sent.status, 1, sent.out);
    assert.match(sent.err, said);
  }
});

testBoth('our client says with which code it was closed, and answers with that', async (t, scheme) => {
  for (const code of [1000, 1001, 1011, 4001]) {
    const sent = await against(t, scheme, { args: ['--request', 'hello'] }, async (peer) => {
      await peer.packet();
      peer.socket.close(code, 'as asked');
      assert.equal((await peer.end()).code, code);
    });
    assert.equal(sent.status, 1, sent.out);
    assert.match(sent.err, new RegExp(`WebSocket code ${code}: as asked`));
  }
  const cut = await against(t, scheme, { args: ['--request', 'hello'] }, async (peer) => {
    await peer.packet();
    peer.socket.terminate();
  });
  assert.equal(cut.status, 1, cut.out);
});

testBoth('our client says why it was not let in', async (t, scheme) => {
  const { url } = await listen(t, scheme, { verifyClient: (_, done) => done(false, 401, 'who are you') });
  const sent = await send(t, url, { args: ['hello'] });
  assert.equal(sent.status, 1);
  assert.match(sent.err, /401/);
});
