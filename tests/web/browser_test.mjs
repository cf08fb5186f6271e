// SPDX-License-Identifier: Apache-2.0
// Two people in two browsers use the chat of examples/chat, while its server is killed and started again; then a third
// comes in from a terminal.
//
//   node tests/web/browser_test.mjs CHAT_SERVER CHAT_CLIENT [SCREENSHOT.png]
//
// They are the programs of the example, or any that take their arguments and print their lines. Needs playwright-core,
// found from MSGTRANS_NODE_MODULES (a directory with node_modules in it; else the current one), and chromium (CHROMIUM, else
// /usr/bin/chromium). Exits with 77 where one of them is missing, and says which.
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { createRequire } from 'node:module';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';

const [program, clientProgram, screenshot] = process.argv.slice(2);
const executablePath = process.env.CHROMIUM ?? '/usr/bin/chromium';

function skip(why) {
  console.log(`skipped: ${why}`);
  process.exit(77);
}

if (!program || !clientProgram) {
  console.error('browser_test.mjs CHAT_SERVER CHAT_CLIENT [SCREENSHOT.png]');
  process.exit(2);
}
if (!existsSync(executablePath)) skip(`there is no ${executablePath}`);
const require = createRequire(path.join(path.resolve(process.env.MSGTRANS_NODE_MODULES ?? '.'), 'here.js'));
let chromium;
try {
  ({ chromium } = require('playwright-core'));
} catch {
  skip('playwright-core is not installed');
}

// ---- the server ----

const freePort = () =>
  new Promise((resolve, reject) => {
    const server = net.createServer().once('error', reject);
    server.listen(0, '127.0.0.1', () => {
      const { port } = server.address();
      server.close(() => resolve(port));
    });
  });

class ChatServer {
  static async start(http, ws) {
    const server = new ChatServer();
    server.process = spawn(path.resolve(program), ['--http', `127.0.0.1:${http}`, '--ws', `127.0.0.1:${ws}`], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    server.ended = new Promise((resolve) => server.process.once('exit', (status, signal) => resolve({ status, signal })));
    server.printed = '';
    server.url = await new Promise((resolve, reject) => {
      server.process.stdout.on('data', (text) => {
        server.printed += text;
        server.ws = /^chat at (ws:\/\/\S+)$/m.exec(server.printed)?.[1];
        const found = /^chat at (http:\/\/\S+)$/m.exec(server.printed);
        if (found) resolve(found[1]);
      });
      server.process.once('error', reject);
      server.ended.then((how) => reject(new Error(`the server ended: ${JSON.stringify(how)} ${server.printed}`)));
      setTimeout(() => reject(new Error(`the server printed no address, but: ${server.printed}`)), 10_000).unref();
    });
    return server;
  }
  async stop(signal) {
    this.process.kill(signal);
    return this.ended;
  }
}

// ---- the people ----

const browsers = [];
const profiles = [];
const complaints = [];

async function visitor(url, name, options = {}) {
  const profile = mkdtempSync(path.join(os.tmpdir(), 'msgtrans-chat-'));
  profiles.push(profile);
  const context = await chromium.launchPersistentContext(profile, {
    executablePath,
    headless: true,
    args: [
      '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
      '--disable-component-update', '--disable-sync',
    ],
    viewport: { width: 1200, height: 760 },
    ...options,
  });
  browsers.push(context);
  const page = context.pages()[0] ?? (await context.newPage());
  page.setDefaultTimeout(10_000);
  page.on('pageerror', (error) => complaints.push(`${name}: ${error.stack}`));
  page.on('console', (message) => {
    // What fails while the server is down fails with these words.
    if (message.type() === 'error' && !/ERR_CONNECTION|WebSocket connection to/.test(message.text())) {
      complaints.push(`${name}: ${message.text()}`);
    }
  });
  await page.goto(url);
  await page.getByLabel('Your name').fill(name);
  await page.getByRole('button', { name: 'Enter the chat' }).click();
  return page;
}

/** chat_client, with pipes for its terminal. */
class Terminal {
  printed = '';
  constructor(...args) {
    this.process = spawn(path.resolve(clientProgram), args, { stdio: ['pipe', 'pipe', 'inherit'] });
    this.process.stdout.on('data', (text) => (this.printed += text));
    this.process.stdin.on('error', () => {}); // it may have ended
    this.ended = new Promise((resolve) => {
      this.process.once('error', (error) => resolve({ error: error.message }));
      this.process.once('close', (status, signal) => resolve({ status, signal }));
    });
  }
  type(line) {
    this.process.stdin.write(`${line}\n`);
  }
  async prints(line) {
    try {
      await until(line, () => this.printed.split('\n').slice(0, -1).includes(line));
    } catch (error) {
      throw new Error(`${error.message}; the terminal shows: ${this.printed}`);
    }
  }
  /** Its input ends. */
  async end() {
    this.process.stdin.end();
    let timer;
    const deadline = new Promise((_, reject) => {
      timer = setTimeout(() => reject(new Error('the client has not ended within 10 s of its input')), 10_000);
    });
    return Promise.race([this.ended, deadline]).finally(() => clearTimeout(timer));
  }
}

const state = (page) => page.locator('#state');
const log = (page) => page.getByRole('log');
const message = (page, text) => log(page).locator('.message', { hasText: text });
const inList = (page, list, name) => page.locator(`#${list} li`).filter({ has: page.locator('.label', { hasText: new RegExp(`^${name}( \\(you\\))?$`) }) }).getByRole('button');

async function say(page, text) {
  await page.locator('#text').fill(text);
  await page.locator('#text').press('Enter');
}

async function until(what, condition) {
  const deadline = Date.now() + 10_000;
  for (;;) {
    if (await condition()) return;
    if (Date.now() > deadline) throw new Error(`not within 10 s: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

const connected = (page) => until('connected', async () => (await state(page).textContent()) === 'Connected');

async function step(name, body) {
  await body();
  console.log(`ok: ${name}`);
}

let server, grace;
try {
  const ports = [await freePort(), await freePort()];
  server = await ChatServer.start(...ports);
  let ada, eva;

  await step('two people come in, and see each other', async () => {
    [ada, eva] = await Promise.all([visitor(server.url, 'Ada'), visitor(server.url, 'Eva', { colorScheme: 'dark' })]);
    await connected(ada);
    await connected(eva);
    await inList(ada, 'people-list', 'Eva').waitFor();
    await inList(eva, 'people-list', 'Ada').waitFor();
  });

  await step('a name that is taken is refused, and another is taken', async () => {
    const other = await visitor(server.url, 'ada');
    await until('told so', async () => /called ada already/i.test(await other.locator('#name-error').textContent()));
    await other.getByLabel('Your name').fill('Bob');
    await other.getByRole('button', { name: 'Enter the chat' }).click();
    await connected(other);
    await inList(ada, 'people-list', 'Bob').waitFor();
    await other.context().close();
    await inList(ada, 'people-list', 'Bob').waitFor({ state: 'detached' });
  });

  await step('what one says the other reads, as text whatever it is', async () => {
    const hostile = '<img src=x onerror="document.title=1"> & <b>bold</b>';
    await say(ada, 'Hello Eva, how is the weather?');
    await say(ada, hostile);
    await message(eva, hostile).waitFor();
    await say(eva, 'Sunny, and no wind at all.');
    await message(ada, 'Sunny').waitFor();
    assert.equal(await log(eva).locator('img, b').count(), 0);
    for (const page of [ada, eva]) {
      const texts = await log(page).locator('.message .text').allTextContents();
      assert.deepEqual(texts, ['Hello Eva, how is the weather?', hostile, 'Sunny, and no wind at all.']);
    }
    assert.equal(await log(ada).locator('.waiting').count(), 0);
  });

  await step('what is said elsewhere is counted as unread', async () => {
    await inList(eva, 'rooms', 'Help').click();
    await until('in Help', async () => (await eva.locator('#title').textContent()) === '# Help');
    await say(ada, 'Are you still there?');
    await until('one unread', async () => /^1 unread$/.test(await inList(eva, 'rooms', 'Lobby').locator('.badge').textContent()));
    await until('the title', async () => (await eva.title()).startsWith('(1) '));
    await inList(eva, 'rooms', 'Lobby').click();
    await message(eva, 'Are you still there?').waitFor();
    assert.equal(await inList(eva, 'rooms', 'Lobby').locator('.badge').count(), 0);
  });

  await step('a private message is delivered, and marked so', async () => {
    await inList(ada, 'people-list', 'Eva').click();
    await say(ada, 'This is between us.');
    await message(ada, 'This is between us.').getByText('Delivered').waitFor();
    await until('unread', async () => (await inList(eva, 'directs', 'Ada').locator('.badge').count()) === 1);
    await inList(eva, 'directs', 'Ada').click();
    await message(eva, 'This is between us.').waitFor();
    await say(eva, 'And stays so.');
    await message(ada, 'And stays so.').waitFor();
    await inList(ada, 'rooms', 'Lobby').click();
    assert.equal(await message(ada, 'between us').count(), 0);
  });

  await step('a reload comes back as the same person, with the history', async () => {
    await eva.reload();
    await connected(eva);
    await inList(eva, 'rooms', 'Lobby').click();
    await message(eva, 'Are you still there?').waitFor();
    await inList(ada, 'people-list', 'Eva').waitFor();
  });

  await step('the server is killed: both see it, and nothing can be sent', async () => {
    assert.equal((await server.stop('SIGKILL')).signal, 'SIGKILL');
    for (const page of [ada, eva]) {
      await page.locator('#banner').waitFor();
      assert.match(await state(page).textContent(), /Reconnecting/);
      await page.locator('#text').fill('not yet');
      assert(await page.locator('#send').isDisabled());
    }
  });

  await step('it is started again: both come back by themselves, and go on', async () => {
    server = await ChatServer.start(...ports);
    for (const page of [ada, eva]) {
      await connected(page);
      await page.locator('#banner').waitFor({ state: 'hidden' });
    }
    await inList(ada, 'people-list', 'Eva').waitFor();
    await say(ada, 'There you are again.');
    await message(eva, 'There you are again.').waitFor();
    assert.equal(await message(eva, 'There you are again.').count(), 1);
    assert.equal(await message(ada, 'Are you still there?').count(), 1); // what was seen stays
    assert.equal(await message(ada, 'not yet').count(), 0);
  });

  await step('somebody comes in from a terminal, and all three see each other', async () => {
    grace = new Terminal(server.ws, 'Grace', 'Lobby');
    for (const page of [ada, eva]) {
      await inList(page, 'people-list', 'Grace').waitFor();
      await log(page).locator('.note', { hasText: /^Grace came in$/ }).waitFor();
    }
    await until('who is there', () => /^\* in Lobby: /m.test(grace.printed));
    const [history, members] = grace.printed.split('\n');
    assert.equal(history, 'Ada: There you are again.');
    assert.deepEqual(members.replace('* in Lobby: ', '').split(', ').sort(), ['Ada', 'Eva', 'Grace']);
  });

  await step('what is said in the terminal both pages show, and what they say is printed', async () => {
    grace.type('Good evening from a terminal, and <b>no markup</b>.');
    for (const page of [ada, eva]) {
      const shown = message(page, 'Good evening from a terminal, and <b>no markup</b>.');
      await shown.getByText('Grace', { exact: true }).waitFor();
      assert.equal(await shown.count(), 1);
    }
    await say(ada, 'Good evening, Grace!');
    await grace.prints('Ada: Good evening, Grace!');
    await say(eva, 'How does it look from there?');
    await grace.prints('Eva: How does it look from there?');
    grace.type('Plain, and quick.');
    for (const page of [ada, eva]) await message(page, 'Plain, and quick.').waitFor();
  });

  await step('a private message goes from the terminal to a page, and back', async () => {
    grace.type('/to Eva Only you can read this.');
    await grace.prints('* delivered to Eva');
    await until('unread', async () => (await inList(eva, 'directs', 'Grace').locator('.badge').count()) === 1);
    await inList(eva, 'directs', 'Grace').click();
    await message(eva, 'Only you can read this.').waitFor();
    await say(eva, 'And you alone read this.');
    await message(eva, 'And you alone read this.').getByText('Delivered').waitFor();
    await grace.prints('Eva to you alone: And you alone read this.');
    grace.type('/to Nobody Hello?');
    await grace.prints('! nobody of that name is here');
    assert.equal(await message(ada, 'read this').count(), 0);
    assert.equal(await inList(ada, 'directs', 'Grace').count(), 0);
    await inList(eva, 'rooms', 'Lobby').click();
  });

  if (screenshot) {
    await ada.screenshot({ path: screenshot });
    console.log(`ok: screenshot in ${screenshot}`);
  }

  await step('at the end of its input the terminal leaves, and both pages see it', async () => {
    assert.deepEqual(await grace.end(), { status: 0, signal: null });
    for (const page of [ada, eva]) {
      await inList(page, 'people-list', 'Grace').waitFor({ state: 'detached' });
      await log(page).locator('.note', { hasText: /^Grace left$/ }).waitFor();
    }
    assert.deepEqual(grace.printed.split('\n').slice(2), [
      'Ada: Good evening, Grace!',
      'Eva: How does it look from there?',
      '* delivered to Eva',
      'Eva to you alone: And you alone read this.',
      '! nobody of that name is here',
      '',
    ]);
  });

  await step('nobody complained in the browsers', () => assert.deepEqual(complaints, []));

  await step('at SIGTERM the server ends well', async () => {
    for (const browser of browsers.splice(0)) await browser.close();
    assert.deepEqual(await server.stop('SIGTERM'), { status: 0, signal: null });
    assert.match(server.printed, /^served \d+ sessions: /m);
  });
} finally {
  for (const browser of browsers) await browser.close().catch(() => {});
  for (const profile of profiles) rmSync(profile, { recursive: true, force: true });
  server?.process.kill('SIGKILL');
  grace?.process.kill('SIGKILL');
}
