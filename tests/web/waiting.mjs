// SPDX-License-Identifier: Apache-2.0
// What the tests wait for, with a deadline.

/** The promise's outcome; an error if there is none within `ms`. */
export async function within(what, promise, ms = 10_000) {
  let timer;
  const deadline = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`not within ${ms / 1000} s: ${what}`)), ms);
  });
  return Promise.race([promise, deadline]).finally(() => clearTimeout(timer));
}

/** Something that comes one after the other and is waited for. */
export class Queue {
  #items = [];
  #waiting = [];
  #ms;
  constructor(ms = 10_000) {
    this.#ms = ms;
  }
  push(item) {
    const waiting = this.#waiting.shift();
    if (waiting) waiting(item);
    else this.#items.push(item);
  }
  get length() {
    return this.#items.length;
  }
  async next(what = 'something') {
    if (this.#items.length) return this.#items.shift();
    return within(what, new Promise((resolve) => this.#waiting.push(resolve)), this.#ms);
  }
}
