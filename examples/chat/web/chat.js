// SPDX-License-Identifier: Apache-2.0
// @ts-check
// The page of the chat. The protocol is at the head of server.cpp. What others wrote becomes text nodes only.
import { Client, ConnectionLost, RequestTimeout } from '/msgtrans.js';

const Kind = {
  hello: 1, join: 2, leave: 3, say: 4, whisper: 5, rooms: 6,
  message: 16, presence: 17, room: 18, privateMessage: 19, error: 20,
};
const KEPT = 500; // messages of a conversation
const TOGETHER = 5 * 60_000; // messages of one author within this time stand together

/**
 * @typedef {{ note?: string, day?: string, from?: string, text?: string, time: number, id?: number,
 *             state?: 'sending' | 'sent' | 'delivered' | 'failed', why?: string, element?: HTMLElement }} Item
 * @typedef {{ isRoom: boolean, name: string, items: Item[], unread: number, people: Set<string>, members: number,
 *             joined: boolean, draft: string, firstUnread?: Item | undefined }} Conversation
 */

/** @param {string} id @returns {any} */
const $ = (id) => document.getElementById(id);
/** The server's idea of the same name. @param {string} name */
const keyOf = (name) => name.replace(/[A-Z]/g, (letter) => letter.toLowerCase());

/** @type {Client} */
let client;
let me = { name: '', token: '' };
let limits = { name: 24, text: 2000 };
let online = false;
/** @type {Map<string, Conversation>} */
const rooms = new Map();
/** @type {Map<string, Conversation>} */
const directs = new Map();
/** @type {Conversation | undefined} */
let current;
/** @type {ReturnType<typeof setInterval> | undefined} */
let countdown;

// ---- small things ----

/**
 * @param {string} tag @param {string} [className] @param {string} [text]
 * @param {(Node | undefined)[]} children
 */
function make(tag, className = '', text = '', ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  for (const child of children) if (child) element.append(child);
  return element;
}

/** @param {HTMLElement} element @param {string} name */
function colour(element, name) {
  let hash = 7;
  for (const character of keyOf(name)) hash = (hash * 31 + (character.codePointAt(0) ?? 0)) >>> 0;
  element.style.setProperty('--hue', String((hash * 47) % 360));
}

/** @param {string} name */
function avatar(name) {
  const words = name.split(' ').map((word) => [...word][0] ?? '');
  const element = make('span', 'avatar', (words[0] ?? '') + (words.length > 1 ? words.at(-1) : ''));
  element.setAttribute('aria-hidden', 'true');
  colour(element, name);
  return element;
}

/** Addresses become links, by nodes and never by markup. @param {HTMLElement} element @param {string} text */
function fillText(element, text) {
  for (const part of text.split(/(https?:\/\/[^\s<>"]+[^\s<>".,:;!?)\]}'])/)) {
    if (/^https?:\/\//.test(part) && URL.canParse?.(part)) {
      const link = /** @type {HTMLAnchorElement} */ (make('a', '', part));
      link.href = part;
      link.target = '_blank';
      link.rel = 'noopener noreferrer';
      element.append(link);
    } else if (part) {
      element.append(part);
    }
  }
}

const clock = new Intl.DateTimeFormat(undefined, { hour: '2-digit', minute: '2-digit' });
const calendar = new Intl.DateTimeFormat(undefined, { weekday: 'long', day: 'numeric', month: 'long' });

/** @param {boolean} isRoom @param {string} name @returns {Conversation} */
function conversation(isRoom, name) {
  const all = isRoom ? rooms : directs;
  let found = all.get(keyOf(name));
  if (!found) {
    found = { isRoom, name, items: [], unread: 0, people: new Set(), members: 0, joined: false, draft: '' };
    all.set(keyOf(name), found);
  }
  return found;
}

function remember() {
  const joined = [...rooms.values()].filter((room) => room.joined).map((room) => room.name);
  sessionStorage.setItem('chat', JSON.stringify({ ...me, rooms: joined, current: current?.isRoom ? current.name : '' }));
}

function remembered() {
  try {
    return JSON.parse(sessionStorage.getItem('chat') ?? '{}');
  } catch {
    return {};
  }
}

// ---- talking to the server ----

class Refused extends Error {
  /** @param {string} code @param {string} text */
  constructor(code, text) {
    super(text);
    this.code = code;
  }
}

/** @param {number} kind @param {object} [fields] */
async function ask(kind, fields = {}) {
  const answer = (await client.request(JSON.stringify(fields), { bizType: kind })).json();
  if (!answer.ok) throw new Refused(String(answer.error), String(answer.text));
  return answer;
}

/** @param {unknown} error */
function explain(error) {
  if (error instanceof Refused) return error.message.charAt(0).toUpperCase() + error.message.slice(1);
  if (error instanceof ConnectionLost) return 'The connection was lost; it may or may not have arrived';
  if (error instanceof RequestTimeout) return 'The server did not answer';
  return 'Not sent: there is no connection';
}

async function connect() {
  const config = await (await fetch('/config.json', { cache: 'no-store' })).json();
  const scheme = location.protocol === 'https:' ? 'wss' : 'ws';
  client = new Client(`${scheme}://${location.hostname}:${config.ws}/`, { reconnect: { max: 10_000 } });
  client.onRequest = (request) => {
    if (request.bizType !== Kind.privateMessage) return '{"ok":false}';
    const { from, text, time } = request.json();
    const direct = conversation(false, String(from));
    add(direct, { from: String(from), text: String(text), time: Number(time) });
    return '{"ok":true}';
  };
  client.on('message', hear);
  client.on('open', () => void enter());
  client.on('close', ({ willReconnect }) => {
    online = false;
    if (!willReconnect) showState('closed', 'Disconnected');
    update();
  });
  client.on('reconnecting', ({ attempt, delay }) => showReconnecting(attempt, delay));
  client.on('error', (error) => console.warn(error));
  showState('connecting', 'Connecting…');
  client.connect().catch(() => {});
}

/** After each connecting: the name, then the rooms; the first one again and again if the server is slow to forget us. */
async function enter() {
  try {
    const hello = await ask(Kind.hello, me.token ? { name: me.name, token: me.token } : { name: me.name });
    me = { name: hello.name, token: hello.token };
    limits = hello.limits;
    $('room-name').maxLength = limits.name;
    for (const room of rooms.values()) room.members = 0;
    for (const { room, members } of hello.rooms) conversation(true, room).members = members;
    online = true;
    const before = remembered();
    const wanted = new Set([...rooms.values()].filter((room) => room.joined).map((room) => room.name));
    if (!current) for (const room of before.rooms ?? ['Lobby']) wanted.add(String(room));
    $('welcome').close();
    $('app').hidden = false;
    showState('open', 'Connected');
    for (const room of wanted) await join(room, false);
    if (!current) {
      const joined = [...rooms.values()].filter((room) => room.joined);
      const first = joined.find((room) => room.name === before.current) ?? joined[0];
      if (first) show(first);
    }
    remember();
    update();
    focusText();
  } catch (error) {
    if (!(error instanceof Refused)) return; // the connection ended again; it is tried again
    me.token = '';
    client.close();
    welcome(explain(error));
  }
}

/** @param {string} name @param {boolean} andShow */
async function join(name, andShow) {
  try {
    const joined = await ask(Kind.join, { room: name });
    const room = conversation(true, joined.room);
    const again = room.items.length > 0;
    room.joined = true;
    room.people = new Set(joined.members);
    merge(room, joined.history, again);
    remember();
    if (andShow) show(room);
    else if (room === current) show(room);
    update();
  } catch (error) {
    toast(explain(error));
  }
}

/**
 * What was missed is added. If the server does not know what we have seen, it is another one.
 * @param {Conversation} room @param {any[]} history @param {boolean} again
 */
function merge(room, history, again) {
  const seen = room.items.filter((item) => item.id !== undefined);
  const last = seen.at(-1);
  const at = last ? history.findIndex((one) => one.id === last.id && one.time === last.time) : -1;
  const news = history.slice(at + 1).map(({ from, text, time, id }) => ({ from, text, time, id }));
  if (again && last && at < 0) room.items.push({ note: 'The server was started anew; its memory begins here.', time: Date.now() });
  if (again && room !== current) room.unread += news.length;
  room.items.push(...news);
  room.items.splice(0, room.items.length - KEPT);
}

/** @param {import('/msgtrans.js').Message} message */
function hear(message) {
  const news = message.json();
  if (message.bizType === Kind.message) {
    const room = conversation(true, news.room);
    // Our own comes back too; the answer has told its number already.
    if (news.from === me.name && room.items.some((item) => item.id === news.id && item.time === news.time)) return;
    add(room, { from: news.from, text: news.text, time: news.time, id: news.id });
  } else if (message.bizType === Kind.presence) {
    const room = conversation(true, news.room);
    if (news.event === 'join') room.people.add(news.name);
    else room.people.delete(news.name);
    const did = { join: 'came in', leave: 'left', gone: 'has gone offline' }[/** @type {'join'} */ (news.event)];
    add(room, { note: `${news.name} ${did ?? news.event}`, time: Date.now() });
    update();
  } else if (message.bizType === Kind.room) {
    conversation(true, news.room).members = news.members;
    update();
  } else if (message.bizType === Kind.error) {
    toast(news.text);
  }
}

/** @param {Conversation} where @param {Item} item */
async function transmit(where, item) {
  item.state = 'sending';
  refresh(where, item);
  try {
    if (where.isRoom) {
      const { id, time } = await ask(Kind.say, { room: where.name, text: item.text });
      Object.assign(item, { id, time, state: 'sent' });
    } else {
      await ask(Kind.whisper, { to: where.name, text: item.text });
      item.state = 'delivered';
    }
  } catch (error) {
    item.state = 'failed';
    item.why = explain(error);
  }
  refresh(where, item);
}

// ---- what is shown ----

/** @param {Conversation} where @param {Item} item */
function add(where, item) {
  const previous = where.items.at(-1);
  where.items.push(item);
  const isMine = item.from === me.name;
  const away = where !== current || document.hidden;
  if (!item.note && !isMine && away) {
    if (where.unread === 0) where.firstUnread = item;
    where.unread++;
  }
  if (where.items.length > KEPT) where.items.shift()?.element?.remove();
  if (where === current) {
    const log = $('log');
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    log.querySelector('.empty')?.remove();
    append(previous, item);
    if (atEnd || isMine) log.scrollTop = log.scrollHeight;
    else if (!item.note) $('newest').hidden = false;
  }
  update();
}

/** @param {Item | undefined} previous @param {Item} item */
function append(previous, item) {
  const day = new Date(item.time).toDateString();
  if (!previous || new Date(previous.time).toDateString() !== day) {
    const today = day === new Date().toDateString();
    $('log').append(make('div', 'day', today ? 'Today' : calendar.format(item.time)));
    previous = undefined;
  }
  if (current?.firstUnread === item && item !== current.items[0]) {
    $('log').append(make('div', 'day news', 'New'));
    previous = undefined;
  }
  if (item.note) {
    item.element = make('div', 'note', item.note);
  } else {
    const from = item.from ?? '';
    const same = previous?.from === from && !previous?.note && item.time - (previous?.time ?? 0) < TOGETHER;
    const element = make('div', same ? 'message same' : 'message');
    colour(element, from);
    if (!same) {
      const name = make('strong', '', from);
      const time = /** @type {HTMLTimeElement} */ (make('time', '', clock.format(item.time)));
      time.dateTime = new Date(item.time).toISOString();
      element.append(avatar(from), make('div', 'by', '', name, time));
    } else {
      element.append(make('span', 'hidden', `${from}, ${clock.format(item.time)}`));
    }
    const text = make('div', 'text');
    text.dir = 'auto';
    fillText(text, item.text ?? '');
    element.append(text);
    item.element = element;
    if (current) mark(current, item);
  }
  $('log').append(item.element);
}

/** How far our own message has come. @param {Conversation} where @param {Item} item */
function mark(where, item) {
  const { element } = item;
  if (!element) return;
  element.classList.toggle('waiting', item.state === 'sending');
  element.querySelector('.mark')?.remove();
  if (item.state === 'sending') element.append(make('span', 'mark', '…'));
  if (item.state === 'delivered') element.append(make('span', 'mark good', '✓ Delivered'));
  if (item.state === 'failed') {
    const again = /** @type {HTMLButtonElement} */ (make('button', '', 'Send again'));
    again.type = 'button';
    again.onclick = () => void transmit(where, item);
    element.append(make('span', 'mark bad', '', make('span', '', `✕ ${item.why}`), again));
  }
}

/** @param {Conversation} where @param {Item} item */
function refresh(where, item) {
  if (where !== current) return;
  const log = $('log');
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  mark(where, item);
  if (atEnd) log.scrollTop = log.scrollHeight;
}

/** Not where that would bring up a keyboard. */
function focusText() {
  if (matchMedia('(hover: hover)').matches) $('text').focus();
}

/** @param {Conversation} where */
function show(where) {
  if (current && current !== where) {
    current.draft = $('text').value;
    current.firstUnread = undefined;
  }
  const changed = current !== where;
  current = where;
  where.unread = 0;
  const log = $('log');
  log.setAttribute('aria-live', 'off'); // not all of it is news
  log.replaceChildren();
  where.items.forEach((item, index) => append(where.items[index - 1], item));
  if (!where.items.some((item) => !item.note)) {
    const empty = make('div', 'empty', '', make('big', '', where.isRoom ? '#' : '✉'));
    empty.append(where.isRoom ? `Nothing has been said in ${where.name} yet.` : `This is between you and ${where.name}.`);
    log.prepend(empty);
  }
  log.scrollTop = log.scrollHeight;
  requestAnimationFrame(() => log.setAttribute('aria-live', 'polite'));
  $('newest').hidden = true;
  if (changed) {
    $('text').value = where.draft;
    resize();
  }
  drawer();
  remember();
  update();
  if (changed) focusText();
}

/**
 * Brings a list up to date, leaving elements that stay where they are, so that the focus stays.
 * @param {HTMLElement} list
 * @param {{ key: string, label: string, face: () => HTMLElement, choose: () => void, current?: boolean, unread?: number,
 *           members?: string, outside?: boolean, disabled?: boolean, hint?: string }[]} wanted
 */
function fillList(list, wanted) {
  const there = new Map([...list.children].map((child) => [/** @type {HTMLElement} */ (child).dataset['key'], child]));
  const items = wanted.map((one) => {
    let item = /** @type {HTMLElement | undefined} */ (there.get(one.key));
    if (!item) {
      const button = make('button', 'item', '', one.face(), make('span', 'label', one.label), make('span', 'tail'));
      /** @type {HTMLButtonElement} */ (button).type = 'button';
      item = make('li', '', '', button);
      item.dataset['key'] = one.key;
    }
    const button = /** @type {HTMLButtonElement} */ (item.firstElementChild);
    button.onclick = one.choose;
    button.disabled = one.disabled ?? false;
    button.title = one.hint ?? one.label;
    button.classList.toggle('unread', (one.unread ?? 0) > 0);
    button.classList.toggle('outside', one.outside ?? false);
    if (one.current) button.setAttribute('aria-current', 'true');
    else button.removeAttribute('aria-current');
    const tail = /** @type {HTMLElement} */ (button.lastElementChild);
    if (one.unread) {
      const spoken = make('span', 'hidden', ' unread');
      tail.replaceChildren(make('span', 'badge', one.unread > 99 ? '99+' : String(one.unread), spoken));
    } else {
      tail.replaceChildren(make('span', 'members', one.members ?? '', one.members ? make('span', 'hidden', ' here') : undefined));
    }
    return item;
  });
  if (items.length !== list.children.length || items.some((item, i) => item !== list.children[i])) {
    const focused = document.activeElement;
    list.replaceChildren(...items);
    if (focused instanceof HTMLElement && list.contains(focused)) focused.focus();
  }
}

/** @param {string} a @param {string} b */
const alphabetically = (a, b) => a.localeCompare(b, undefined, { sensitivity: 'base' });

function update() {
  if (!document.hidden && current) current.unread = 0;
  const here = current;
  $('my-name').textContent = me.name;
  $('my-avatar').replaceWith(Object.assign(avatar(me.name), { id: 'my-avatar' }));
  fillList(
    $('rooms'),
    [...rooms.values()].sort((a, b) => alphabetically(a.name, b.name)).map((room) => ({
      key: room.name, label: room.name, face: () => hash(), current: room === here, unread: room.unread,
      members: room.members ? String(room.members) : '', outside: !room.joined,
      hint: `${room.name}: ${room.members} here${room.joined ? '' : '; choose it to come in'}`,
      choose: () => void (room.joined ? show(room) : join(room.name, true)),
    })),
  );
  fillList(
    $('directs'),
    [...directs.values()].map((direct) => ({
      key: direct.name, label: direct.name, face: () => avatar(direct.name), current: direct === here,
      unread: direct.unread, choose: () => show(direct),
    })),
  );
  $('no-directs').hidden = directs.size > 0;
  const people = here?.isRoom ? [...here.people].sort(alphabetically) : here ? [me.name, here.name] : [];
  fillList(
    $('people-list'),
    people.map((name) => ({
      key: name, label: name === me.name ? `${name} (you)` : name, face: () => avatar(name), disabled: name === me.name,
      hint: name === me.name ? 'You' : `Write to ${name} alone`, choose: () => show(conversation(false, name)),
    })),
  );
  $('people-title').textContent = here?.isRoom ? `Here now – ${people.length}` : 'Between';
  if (here) {
    $('title').textContent = here.isRoom ? `# ${here.name}` : here.name;
    const count = here.people.size;
    $('subtitle').textContent = here.isRoom ? `${count} ${count === 1 ? 'person' : 'people'} here` : 'Private: only the two of you see this';
    $('leave').textContent = here.isRoom ? 'Leave' : 'Close';
    $('leave').setAttribute('aria-label', here.isRoom ? `Leave ${here.name}` : `Close the conversation with ${here.name}`);
    $('text').placeholder = here.isRoom ? `Write to # ${here.name}` : `Write to ${here.name} alone`;
    $('text-label').textContent = $('text').placeholder;
  }
  const unread = [...rooms.values(), ...directs.values()].reduce((sum, one) => sum + one.unread, 0);
  document.title = `${unread ? `(${unread}) ` : ''}${here ? `${here.name} – ` : ''}msgtrans chat`;
  $('elsewhere').hidden = unread === 0;
  checkText();
}

function hash() {
  const element = make('span', 'hash', '#');
  element.setAttribute('aria-hidden', 'true');
  return element;
}

function checkText() {
  const length = [...$('text').value].length;
  const over = length > limits.text;
  $('count').textContent = length > limits.text * 0.9 ? `${length} of ${limits.text} characters` : '';
  $('count').classList.toggle('bad', over);
  $('send').disabled = !online || over || !current || !$('text').value.trim();
}

function resize() {
  const text = $('text');
  text.style.height = 'auto';
  text.style.height = `${text.scrollHeight + 2}px`;
  checkText();
}

// ---- the connection ----

/** @param {string} className @param {string} text */
function showState(className, text) {
  clearInterval(countdown);
  $('state').className = `state ${className}`;
  $('state').textContent = text;
  $('banner').hidden = className === 'open' || !current;
  $('banner-text').textContent = text;
  $('countdown').textContent = '';
  $('try-now').hidden = className === 'connecting';
}

/** @param {number} attempt @param {number} delay */
function showReconnecting(attempt, delay) {
  if (!current) {
    $('name-error').textContent = 'The server is not reachable; trying again…';
    return;
  }
  const until = performance.now() + delay;
  showState('waiting', 'Reconnecting…');
  $('banner-text').textContent = 'The connection was lost. Reconnecting…';
  const tick = () => {
    const left = Math.ceil((until - performance.now()) / 1000);
    $('countdown').textContent = left > 1 ? `next attempt in ${left} s` : attempt > 1 ? `attempt ${attempt}` : '';
  };
  tick();
  countdown = setInterval(tick, 500);
}

/** @param {string} text */
function toast(text) {
  if (current) add(current, { note: text, time: Date.now() });
}

// ---- what the user does ----

/** Shows one drawer of a small screen, or none. @param {string} [which] */
function drawer(which) {
  for (const id of ['sidebar', 'people']) $(id).classList.toggle('shown', id === which);
  $('shade').hidden = !which;
  if (which) $(which).querySelector('.close-drawer').focus();
}

/** @param {string} [why] */
function welcome(why = '') {
  const dialog = $('welcome');
  $('name-error').textContent = why;
  $('name').value = me.name || localStorage.getItem('name') || '';
  $('hello').querySelector('button').disabled = false;
  if (!dialog.open) dialog.showModal();
  $('name').select();
}

/** @param {string} theme */
function setTheme(theme) {
  document.documentElement.dataset['theme'] = theme;
}

const dark = matchMedia('(prefers-color-scheme: dark)');
const chosenTheme = () => localStorage.getItem('theme') ?? (dark.matches ? 'dark' : 'light');
setTheme(chosenTheme());
dark.addEventListener('change', () => setTheme(chosenTheme()));
$('theme').onclick = () => {
  localStorage.setItem('theme', chosenTheme() === 'dark' ? 'light' : 'dark');
  setTheme(chosenTheme());
};

$('welcome').addEventListener('cancel', (/** @type {Event} */ event) => event.preventDefault());
$('hello').onsubmit = (/** @type {Event} */ event) => {
  event.preventDefault();
  const name = $('name').value.trim().replace(/\s+/g, ' ');
  if (!name) return;
  me = { name, token: '' };
  localStorage.setItem('name', name);
  $('name-error').textContent = '';
  $('hello').querySelector('button').disabled = true;
  connect().catch(() => welcome('The server is not reachable.'));
};
$('sign-out').onclick = () => {
  sessionStorage.clear();
  client.close();
  location.reload();
};
$('new-room').onsubmit = (/** @type {Event} */ event) => {
  event.preventDefault();
  const name = $('room-name').value.trim().replace(/\s+/g, ' ');
  if (name) void join(name, true);
  $('new-room').reset();
};
$('leave').onclick = async () => {
  const left = current;
  if (!left) return;
  if (left.isRoom) {
    const others = [...rooms.values()].filter((room) => room.joined && room !== left);
    try {
      await ask(Kind.leave, { room: left.name });
    } catch (error) {
      return toast(explain(error));
    }
    left.joined = false;
    left.items = [];
    left.people.clear();
    if (others[0]) show(others[0]);
    else await join(left.name === 'Lobby' ? 'Help' : 'Lobby', true);
  } else {
    directs.delete(keyOf(left.name));
    const room = [...rooms.values()].find((one) => one.joined);
    if (room) show(room);
  }
  remember();
  update();
};
$('composer').onsubmit = (/** @type {Event} */ event) => {
  event.preventDefault();
  checkText();
  if ($('send').disabled || !current) return;
  /** @type {Item} */
  const item = { from: me.name, text: $('text').value.trim(), time: Date.now(), state: 'sending' };
  $('text').value = '';
  current.firstUnread = undefined;
  resize();
  add(current, item);
  void transmit(current, item);
  $('text').focus();
};
$('text').oninput = resize;
$('text').onkeydown = (/** @type {KeyboardEvent} */ event) => {
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $('composer').requestSubmit();
};
$('log').onscroll = () => {
  const log = $('log');
  if (log.scrollHeight - log.scrollTop - log.clientHeight < 60) $('newest').hidden = true;
};
$('newest').onclick = () => ($('log').scrollTop = $('log').scrollHeight);
$('try-now').onclick = () => client.connect().catch(() => {});
$('open-sidebar').onclick = () => drawer('sidebar');
$('open-people').onclick = () => drawer('people');
$('shade').onclick = () => drawer();
for (const button of document.querySelectorAll('.close-drawer')) button.addEventListener('click', () => drawer());
document.addEventListener('keydown', (event) => {
  if (event.key === 'Escape') drawer();
});
document.addEventListener('visibilitychange', update);
addEventListener('pagehide', () => client?.close());
addEventListener('pageshow', (event) => {
  if (event.persisted) location.reload();
});

const before = remembered();
if (before.name) {
  me = { name: before.name, token: before.token };
  connect().catch(() => welcome('The server is not reachable.'));
} else {
  welcome();
}
