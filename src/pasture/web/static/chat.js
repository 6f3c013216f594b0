// Conversations side by side on one pool. A fork copies the messages in this page and nothing on the server: the branch finds
// its beginning in the live cache, and the badge on each reply says how much of the prompt was found.

import { html, nothing, render } from "./lit-html.js";
import { ask, events, follow, key } from "./server.js";
import { header, keyDialog, openKey, speak } from "./shell.js";
import { count, percent, plural, seconds } from "./words.js";

const NOT_HERE = "nothing is generated on this port: chat on the server's main port";

const page = document.getElementById("app");
page.replaceChildren();
const view = { state: "starting", snapshot: null, chats: [], made: 0, document: "", fileName: "", maxTokens: 200 };

function open(messages = [], forked = null) {
  view.made += 1;
  const chat = { id: view.made, name: `Chat ${view.made}`, messages, forked, withDocument: true, leaving: null, trouble: null };
  view.chats.push(chat);
  return chat;
}

function close(chat) {
  chat.leaving?.abort();
  view.chats = view.chats.filter((other) => other !== chat);
  if (!view.chats.length) open();
  draw();
}

/** A new chat with everything up to and including a message. */
function fork(chat, index) {
  const messages = chat.messages.slice(0, index + 1).map((message) => ({ ...message }));
  const branch = open(messages, { from: chat.name, messages: messages.length, first: null });
  branch.withDocument = chat.withDocument;
  draw();
  speak(`${branch.name} is a fork of ${chat.name}`);
  document.getElementById(`say-${branch.id}`)?.focus();
}

function prompt(chat) {
  const messages = chat.messages.map(({ role, content }) => ({ role, content }));
  const document_ = view.document.trim();
  if (document_ && chat.withDocument) messages.unshift({ role: "system", content: `Answer from this document.\n\n${document_}` });
  return messages;
}

async function say(chat, text) {
  if (chat.leaving || !text.trim()) return;
  chat.trouble = null;
  chat.messages.push({ role: "user", content: text.trim() });
  const body = {
    model: view.snapshot?.model ?? "default",
    messages: prompt(chat),
    max_tokens: view.maxTokens,
    stream: true,
    stream_options: { include_usage: true },
    pasture: true,
  };
  const reply = { role: "assistant", content: "", usage: null, found: null, first: null, trouble: null };
  chat.messages.push(reply);
  chat.leaving = new AbortController();
  draw();
  const sent = performance.now();
  try {
    for await (const event of events(await ask("v1/chat/completions", { body, signal: chat.leaving.signal }))) {
      if (event.error) throw new Error(event.error.message);
      const piece = event.choices?.[0]?.delta?.content;
      if (piece) {
        reply.first ??= (performance.now() - sent) / 1000;
        reply.content += piece;
        soon();
      }
      if (event.usage) reply.usage = event.usage;
      reply.found ??= event.pasture?.choices[0].cache?.found ?? null;
    }
    if (!reply.usage) throw new Error("the connection ended before the reply did");
    if (chat.forked) chat.forked.first ??= reply.usage;
  } catch (error) {
    if (error.status === 401) openKey();
    endEarly(chat, reply, error);
  }
  chat.leaving = null;
  draw();
  speak(chat.trouble ? `${chat.name}: ${chat.trouble}` : `${chat.name} has answered. ${badgeWords(reply)}`);
}

/** Keeps what has come of a reply. Of one without a word nothing is kept: its question goes back to where it was typed. */
function endEarly(chat, reply, error) {
  const trouble = error.name === "AbortError" ? "stopped" : error.status === 404 ? NOT_HERE : error.message;
  if (reply.content) {
    reply.trouble = trouble;
    return;
  }
  chat.trouble = trouble;
  const [question] = chat.messages.splice(-2);
  const field = document.getElementById(`say-${chat.id}`);
  if (field) field.value = [question.content, field.value].filter(Boolean).join("\n");
}

let drawing = 0;
function soon() {
  cancelAnimationFrame(drawing);
  drawing = requestAnimationFrame(draw);
}

function draw() {
  const ends = [...page.querySelectorAll(".messages")].filter((list) => list.scrollHeight - list.scrollTop - list.clientHeight < 40);
  render(template(), page);
  for (const list of ends) list.scrollTop = list.scrollHeight;
}

// Pieces

const template = () => html`
  ${header({ here: "chat", model: view.snapshot?.model, state: view.state, draining: view.snapshot?.draining })}
  <main id="main">
    ${bench()}
    <div class="chats">${view.chats.map(column)}</div>
  </main>
  ${keyDialog(() => draw())}`;

const bench = () => html`
  <section class="bench" aria-label="All chats">
    <p>${view.snapshot ? html`One pool: <strong>${percent(view.snapshot.pool.used_cells, view.snapshot.pool.cells)}</strong> used,
      <strong id="saved-cells">${count(view.snapshot.pool.saved_cells)}</strong> cells saved by sharing now` : "One pool for all chats"}</p>
    <button type="button" @click=${() => { open(); draw(); }}>New chat</button>
    <details><summary>Shared document${view.document.trim() ? ` (${count(view.document.length)} characters)` : ""}</summary>
      <label for="document">Text that the chats begin with: it is computed once</label>
      <textarea id="document" rows="5" .value=${view.document} @input=${(event) => { view.document = event.target.value; draw(); }}></textarea>
      <label for="file">or a text file</label> <input id="file" type="file" accept="text/*,.md" @change=${read}>
    </details>
    <form class="say" @submit=${sayToAll}><label class="unseen" for="all">Ask all chats</label>
      <input id="all" placeholder="Ask all chats" autocomplete="off"><button>Ask all</button></form>
    <p><label for="length">Longest reply</label> <input id="length" class="number" type="number" min="1" max="4096" .value=${String(view.maxTokens)}
      @change=${(event) => { view.maxTokens = Math.max(1, Number(event.target.value) || 200); }}></p>
  </section>`;

async function read(event) {
  const file = event.target.files[0];
  if (!file) return;
  view.document = await file.text();
  draw();
}

function sayToAll(event) {
  event.preventDefault();
  const field = event.target.querySelector("input");
  const text = field.value;
  field.value = "";
  for (const chat of view.chats) say(chat, text);
}

const column = (chat) => html`
  <section class="chat" aria-label=${chat.name}>
    <div class="chat-head"><h2>${chat.name}</h2>
      ${view.document.trim() ? html`<label class="note"><input type="checkbox" .checked=${chat.withDocument} @change=${(event) => { chat.withDocument = event.target.checked; }}> document</label>` : nothing}
      <button type="button" class="quiet" @click=${() => close(chat)} aria-label="Close ${chat.name}">Close</button></div>
    ${chat.forked ? html`<p class="fork-note">A fork of ${chat.forked.from} after ${plural(chat.forked.messages, "message")}:
      <strong>${forkWords(chat.forked)}</strong></p>` : nothing}
    <ol class="messages" tabindex="0" aria-label="Messages of ${chat.name}">${chat.messages.map((message, index) => bubble(chat, message, index))}</ol>
    ${chat.trouble ? html`<p class="bad">${chat.trouble}</p>` : nothing}
    <form class="say" @submit=${(event) => { event.preventDefault(); send(chat); }}>
      <label class="unseen" for="say-${chat.id}">Message to ${chat.name}</label>
      <textarea id="say-${chat.id}" rows="2" placeholder="Message" @input=${(event) => typing(chat, event.target)} @keydown=${(event) => sendOnEnter(event, chat)}></textarea>
      ${chat.leaving ? html`<button type="button" class="quiet" @click=${() => chat.leaving.abort()}>Stop</button>` : html`<button>Send</button>`}
    </form>
  </section>`;

const HINT_MS = 100;

/** A draft up to its last complete word or sentence: what the server makes ready of it. */
const complete = (draft) => draft.match(/^[^]*(?:\S(?=\s)|[.!?]$)/)?.[0] ?? "";

/** Tells the server what is being typed, at the first letter and with every complete word, so that it is ready when it is sent. */
function typing(chat, field) {
  const known = complete(field.value);
  if (chat.hinting || chat.leaving || !field.value.trim() || known === chat.hinted) return;
  chat.hinted = known;
  ask("v1/chat/prefetch", { body: { messages: prompt(chat), draft: field.value } }).catch(() => {}); // it is only a hint
  chat.hinting = setTimeout(() => {
    chat.hinting = null;
    typing(chat, field);
  }, HINT_MS);
}

function sendOnEnter(event, chat) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send(chat);
}

function send(chat) {
  const field = document.getElementById(`say-${chat.id}`);
  const text = field.value;
  if (chat.leaving || !text.trim()) return;
  field.value = "";
  chat.hinted = null;
  say(chat, text);
}

const bubble = (chat, message, index) => html`
  <li class="message ${message.role}"><span class="who">${message.role === "user" ? "You" : "Reply"}</span>
    <p class="text">${message.content || (message.usage ? "(an empty reply)" : "…")}</p>
    <div class="under">
      ${message.trouble ? html`<span class="bad">${message.trouble}</span>` : nothing}
      ${message.usage ? html`<span class="badge">${badgeWords(message)}</span>` : nothing}
      ${message.role === "assistant" && message.content && !(chat.leaving && index === chat.messages.length - 1) ? html`<button type="button" class="quiet" @click=${() => fork(chat, index)}>Fork here</button>` : nothing}
    </div></li>`;

const reusedOf = (usage) => usage.prompt_tokens_details?.cached_tokens ?? 0;

/** What a fork costs is known when it has been asked something. */
function forkWords({ first }) {
  if (!first) return "nothing is copied";
  const reused = reusedOf(first);
  return `its first reply reused ${plural(reused, "token")} and computed ${count(first.prompt_tokens - reused)}`;
}

function badgeWords({ usage, found, first }) {
  if (!usage) return "";
  const reused = reusedOf(usage);
  return `reused ${count(reused)} of ${plural(usage.prompt_tokens, "token")}${whence(reused, found)}${first === null ? "" : ` · first token ${seconds(first)}`}`;
}

/** Where the reused tokens were when the request came. */
function whence(reused, found) {
  if (!reused || !found) return "";
  if (found.live >= reused) return ", live in the cache";
  return found.ram >= reused ? ", from RAM" : ", from a slower tier or computed just before";
}

// Start

open();
open();
draw();
follow(
  (snapshot) => {
    view.state = "live";
    view.snapshot = snapshot;
    draw();
  },
  (state) => {
    // a user's key opens the chat, and on a server with an admin key not the numbers
    view.state = state === "elsewhere" ? "apart" : state === "locked" && key("api") ? "private" : state;
    draw();
  },
);
