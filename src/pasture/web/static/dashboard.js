// The dashboard: one snapshot after the other, drawn whole, a piece a frame. lit-html touches only what differs.

import { html, nothing, render, svg } from "./lit-html.js";
import { PoolPicture, colourOf, holdersOf, ownerOf, treeOf } from "./pool.js";
import { ask, follow } from "./server.js";
import { header, keyDialog, openKey, speak } from "./shell.js";
import { bytes, compact, count, percent, plural, seconds } from "./words.js";

const HISTORY = 120;
const SIBLINGS = 6;
const OPEN_LEVELS = 2;
const SPEAK_EVERY = 30000;

const page = document.getElementById("app");
page.replaceChildren();
const view = { state: "starting", snapshot: null, tree: null, selected: null, text: null, copies: null, listed: false, unfolded: new Set(), turned: new Set() };
const kept = { open: false, offset: 0, total: 0, rows: [], note: "" };
const history = { generated: [], first: [], inter: [] };
let picture = null;
let spokenAt = 0;
let pieces = [];
let frame = 0;

/** The page now, because somebody did something; the rest of it in the next frames. */
function draw() {
  drawPage();
  drawByFrames(drawList, drawPicture);
}

/** One of these a frame, so that none is long; what was left to draw of an older snapshot is not drawn any more. */
function drawByFrames(...drawings) {
  pieces = drawings;
  frame ||= requestAnimationFrame(drawNext);
}

function drawNext() {
  pieces.shift()();
  frame = pieces.length ? requestAnimationFrame(drawNext) : 0;
}

function drawPage() {
  render(template(), page);
}

function drawList() {
  const list = page.querySelector(".sequences > div");
  if (list) render(view.listed ? sequenceTable(view.snapshot.sequences) : nothing, list);
}

function drawPicture() {
  const canvas = page.querySelector("canvas");
  if (!canvas || !view.snapshot) return;
  picture ??= new PoolPicture(canvas);
  picture.update(view.snapshot, view.tree);
}

function onSnapshot(snapshot) {
  view.state = "live";
  view.snapshot = snapshot;
  view.tree = treeOf(snapshot);
  push(history.generated, snapshot.rates.generated);
  push(history.first, snapshot.latency.first_token?.p50 ?? null);
  push(history.inter, snapshot.latency.inter_token?.p50 ?? null);
  if (picture) drawByFrames(drawPicture, drawPage, drawList);
  else draw();
  if (Date.now() - spokenAt > SPEAK_EVERY) {
    spokenAt = Date.now();
    speak(summary(snapshot));
  }
}

function push(list, value) {
  list.push(value);
  if (list.length > HISTORY) list.shift();
}

const busy = (r) => r.waiting + r.prefilling + r.decoding + r.swapped;

function summary({ headline, requests, pool }) {
  return `${plural(requests.users, "user")} now, ${plural(busy(requests), "request")}. ${percent(headline.reused_tokens, headline.prompt_tokens)} of prompt tokens
    reused. ${percent(pool.used_cells, pool.cells)} of the live cache is used, ${count(pool.saved_cells)} cells are saved by sharing.`;
}

// Pieces

const template = () => html`
  ${header({ here: "dashboard", model: view.snapshot?.model, state: view.state, draining: view.snapshot?.draining })}
  <main id="main">
    ${NOTICES[view.state]?.() ?? nothing}
    ${view.snapshot ? content(view.snapshot) : view.state in NOTICES ? nothing : html`<p class="loading">Looking at the server …</p>`}
  </main>
  ${keyDialog(() => draw())}`;

const NOTICES = {
  locked: () => html`<p class="notice">This server shows its numbers to those who have its key.
    <button type="button" @click=${openKey}>Enter the key</button></p>`,
  elsewhere: () => html`<p class="notice">There are no live numbers on this port. The server has an admin port (<code>--admin-port</code>):
    open this page there.</p>`,
};

const content = (snapshot) => html`
  ${headline(snapshot)} ${tiles(snapshot)} ${snapshot.cluster ? cluster(snapshot.cluster) : nothing} ${pool(snapshot)} ${tiers(snapshot)}
  <div class="columns">${prefixes()} <div>${detail()} ${happenings(snapshot)}</div></div>
  ${namespaces(snapshot)} ${sequences(snapshot)} ${sessions()}`;

const headline = ({ headline: h }) => html`
  <section class="headline" aria-label="Since the server started">
    <p class="figure reused"><strong id="reused">${compact(h.reused_tokens)}</strong> prompt tokens reused
      <small>${percent(h.reused_tokens, h.prompt_tokens)} of ${compact(h.prompt_tokens)}</small></p>
    <p class="figure"><strong id="computed">${compact(h.computed_tokens)}</strong> computed
      <small>${h.prefill_tokens_per_second ? `at ${compact(h.prefill_tokens_per_second)} tokens/s` : "no rate measured yet"}</small></p>
    <p class="figure"><strong id="saved">${h.saved_seconds === null ? "–" : seconds(h.saved_seconds)}</strong> of computing saved
      <small>what the reused tokens would take at that rate</small></p>
  </section>`;

const tiles = ({ requests: r, rates, latency, headline: h, uptime_seconds: uptime }) => html`
  <section class="tiles" aria-label="Now">
    ${tile("Users now", count(r.users), `${plural(busy(r), "request")}: ${r.decoding} replying, ${r.prefilling} reading, ${r.waiting} waiting${r.swapped ? `, ${r.swapped} swapped out` : ""}`)}
    ${tile("Tokens a second", compact(rates.generated), `generated; ${compact(h.generated_tokens)} so far`, history.generated)}
    ${tile("Time to first token", seconds(latency.first_token?.p50), spread(latency.first_token), history.first)}
    ${tile("Between tokens", seconds(latency.inter_token?.p50), spread(latency.inter_token), history.inter)}
    ${tile("Answered", compact(r.finished), `${r.rejected ? `${count(r.rejected)} turned away, ` : ""}up for ${seconds(uptime)}`)}
  </section>`;

const spread = (l) => (l ? `median of a minute; 95 %: ${seconds(l.p95)}, 99 %: ${seconds(l.p99)}` : "nobody in the last minute");

const tile = (name, value, note, line) => html`
  <div class="tile"><h2>${name}</h2><p class="value">${value}</p>${line ? spark(line) : nothing}<p class="note">${note}</p></div>`;

function spark(values) {
  const most = Math.max(...values.map((v) => v ?? 0), 1e-9);
  const points = values.map((v, i) => `${(((HISTORY - values.length + i) * 100) / (HISTORY - 1)).toFixed(1)},${(27 - (25 * (v ?? 0)) / most).toFixed(1)}`);
  return html`<svg class="spark" viewBox="0 0 100 28" preserveAspectRatio="none" aria-hidden="true">
    ${svg`<polyline points=${points.join(" ")} vector-effect="non-scaling-stroke"></polyline>`}</svg>`;
}

const pool = ({ pool: p }) => html`
  <section aria-labelledby="pool-title">
    <h2 id="pool-title">The live cache</h2>
    <p class="facts"><strong>${percent(p.used_cells, p.cells)}</strong> of ${count(p.cells)} cells (${bytes(p.bytes)}),
      <b class="shared-word">${count(p.shared_cells)} shared</b>, saving ${count(p.saved_cells)};
      ${count(p.running_cells)} in use, ${count(p.idle_cells)} idle; ${plural(p.sequences, "sequence")}, ${p.layout}, ${p.form}</p>
    ${sharing(p)}
    <canvas role="img" aria-label="${percent(p.used_cells, p.cells)} of the live cache used, ${percent(p.shared_cells, p.used_cells)} of that shared"
      @click=${pick} @mousemove=${hint}></canvas>
    <p class="legend"><i class="key-shared"></i> several hold it <i class="key-own"></i> one conversation's own
      <i class="key-idle"></i> idle <i class="key-free"></i> free${picture?.cellsEach ? ` · a square is about ${plural(Math.max(1, Math.round(picture.cellsEach)), "cell")}` : ""}</p>
  </section>`;

function hint(event) {
  const segment = picture?.at(event.offsetX, event.offsetY);
  event.currentTarget.title = !segment ? "free" : segment.node ? describe(segment.node) : `${count(segment.tokens)} cells of many small prefixes`;
}

function pick(event) {
  const node = picture?.at(event.offsetX, event.offsetY)?.node;
  if (node) select(node.number);
}

const tiers = (snapshot) => html`
  <section aria-labelledby="tiers-title"><h2 id="tiers-title">Where conversations rest</h2>
    ${snapshot.tiers.filter((t) => t.budget_bytes || t.remote).length ? html`<div class="tiers">${snapshot.tiers.filter((t) => t.budget_bytes || t.remote).map(tier)}</div>` : html`<p class="note">Nowhere: what leaves the live cache is computed again.</p>`}
  </section>`;

/** What everybody's conversations come to, above what they take: the difference is what sharing saves. */
function sharing(p) {
  const apart = p.used_cells + p.saved_cells;
  if (!p.saved_cells || p.saved_cells * 20 < p.used_cells) return nothing;
  const bar = (className, cells, width, words) => html`<div class="weigh"><svg class="bar ${className}" aria-hidden="true">${svg`<rect width="${width}%" height="100%"></rect>`}</svg>
    <span><strong>${count(cells)}</strong> ${words}</span></div>`;
  return html`<div class="sharing">
    ${bar("apart", apart, 100, `tokens that ${plural(p.sequences, "conversation")} hold`)}
    ${bar("together", p.used_cells, (100 * p.used_cells) / apart, "cells that they take together")}
    <p class="factor"><strong>${(apart / p.used_cells).toFixed(1)}×</strong> <small>less room than apart</small></p></div>`;
}

const FORMS = ["raw", "lossless", "q8_0", "q4_0"];

function tier(t) {
  let at = 0;
  const parts = FORMS.filter((form) => t.bytes_by_form[form]).map((form) => {
    const width = (100 * t.bytes_by_form[form]) / t.budget_bytes;
    at += width;
    return svg`<rect class="form ${form}" x="${at - width}%" width="${width}%" height="100%"></rect>`;
  });
  const forms = FORMS.filter((form) => t.bytes_by_form[form]).map((form) => `${bytes(t.bytes_by_form[form])} ${form}`);
  if (t.remote) return shared(t);
  return html`<div class="tier"><h3>${t.name === "ram" ? "RAM" : t.name}</h3>
    <svg class="bar" role="img" aria-label="${percent(t.bytes, t.budget_bytes)} of ${t.name} used">${parts}</svg>
    <p><strong>${bytes(t.bytes)}</strong> of ${bytes(t.budget_bytes)}, ${plural(t.blocks, "block")}${forms.length ? `: ${forms.join(", ")}` : ""}</p>
    <p class="note">${compact(t.hit_tokens)} tokens found, ${compact(t.missed_tokens)} not${t.hit_tokens ? `; read at ${bytes(t.bytes_per_second)}/s` : ""}${t.errors ? html`; <b class="bad">${plural(t.errors, "error")}</b>` : nothing}</p></div>`;
}

/** A store that several servers share: how full it is matters less than whether it answers. */
function shared(t) {
  return html`<div class="tier"><h3>${t.remote.kind} over ${t.remote.transport}${t.remote.sealed ? ", sealed" : ""}</h3>
    <ul class="servers">${t.remote.servers.map((s) => html`<li>${s.address}: ${s.state === "closed" ? `answers in ${(1000 * s.round_trip_seconds).toFixed(1)} ms` : html`<b class="bad">left alone, it does not answer</b>`}</li>`)}</ul>
    <p class="note">${compact(t.hit_tokens)} tokens found, ${compact(t.missed_tokens)} not; ${bytes(t.written_bytes)} written, ${bytes(t.read_bytes)} read</p>
    ${t.remote.warnings.map((text) => html`<p class="note bad">${text}</p>`)}</div>`;
}

// Several servers, on the page of an ingress

const REASONS = {
  session: "to where their session is", prefix: "to where their beginning is known to be", head: "to where their beginning was sent before",
  ring: "by the ring", spilled: "away from a server that had too much", busy: "to a server that had too much: no other was cheaper",
};

const cluster = ({ replicas, decisions, pulls, survived }) => html`
  <section aria-labelledby="cluster-title"><h2 id="cluster-title">${plural(replicas.length, "server")} in the cluster</h2>
    <div class="scroll" tabindex="0" role="region" aria-label="Servers"><table>
      <thead><tr><th scope="col">Server</th><th scope="col">Machine</th><th scope="col">State</th><th scope="col">Requests</th><th scope="col">Tokens to read</th><th scope="col">Blocks known</th><th scope="col">Live cache</th></tr></thead>
      <tbody>${replicas.map(([name, node, up, draining, running, uncached, blocks, used, cells]) => html`<tr><th scope="row">${name}</th><td>${node}</td>
        <td>${draining ? "draining" : `up for ${seconds(up)}`}</td><td>${count(running)}</td><td>${count(uncached)}</td><td>${compact(blocks)}</td>
        <td><svg class="bar" role="img" aria-label="${percent(used, cells)} used">${svg`<rect class="form raw" width="${cells ? (100 * used) / cells : 0}%" height="100%"></rect>`}</svg></td></tr>`)}</tbody>
    </table></div>
    <ul class="moves">${Object.entries(decisions).sort((a, b) => b[1] - a[1]).map(([reason, n]) => html`<li><strong>${compact(n)}</strong> ${REASONS[reason] ?? reason}</li>`)}
      ${pulls ? html`<li><strong>${compact(pulls)}</strong> moved, with their blocks pulled from another server</li>` : nothing}
      ${survived ? html`<li><strong>${compact(survived)}</strong> went on elsewhere after their server was lost</li>` : nothing}</ul>
  </section>`;

// The prefix tree

const prefixes = () => html`
  <section aria-labelledby="tree-title"><h2 id="tree-title">Prefixes</h2>
    ${view.tree.roots.length ? html`<div class="scroll">${servers(view.tree.roots).map(tree)}</div>` : html`<p class="note">The live cache is empty.</p>`}
  </section>`;

/** The trees of each server in turn; a server alone has no name. */
const servers = (roots) => [...new Set(roots.map((root) => root.replica))].map((name) => [name, roots.filter((root) => root.replica === name)]);

const tree = ([name, roots]) => html`${name === null ? nothing : html`<h3>${name}</h3>`}<ul class="tree" aria-label=${name ?? nothing}>${family(name, roots, 0)}</ul>`;

/** `name`: what they are the children of: a node's number, or a server. */
function family(name, nodes, level) {
  const ordered = [...nodes].sort((a, b) => b.holders - a.holders || b.tokens - a.tokens);
  const shown = view.unfolded.has(name) ? ordered : ordered.slice(0, SIBLINGS);
  const more = ordered.length - shown.length;
  return html`${shown.map((node) => branch(node, level))}
    ${more ? html`<li><button type="button" class="quiet" @click=${() => { view.unfolded.add(name); draw(); }}>and ${count(more)} more</button></li>` : nothing}`;
}

/** The first levels are open, deeper ones closed, unless somebody turned them. */
const isOpen = (node, level) => (level < OPEN_LEVELS) !== view.turned.has(node.number);

function turn(node) {
  view.turned.delete(node.number) || view.turned.add(node.number);
  draw();
}

const branch = (node, level) => html`<li><div class="row">
  ${node.children.length ? html`<button type="button" class="turn" aria-expanded=${isOpen(node, level) ? "true" : "false"} aria-label="${node.children.length} that go on from here" @click=${() => turn(node)}>${isOpen(node, level) ? "▾" : "▸"}</button>` : html`<span class="turn"></span>`}
  <button type="button" class="node ${node.holders > 1 ? "shared" : ""} ${node.running ? "" : "idle"}" aria-pressed=${view.selected === node.number ? "true" : "false"} @click=${() => select(node.number)}>
    <svg class="swatch" aria-hidden="true">${svg`<rect width=${Math.max(3, Math.min(36, Math.sqrt(node.tokens)))} height="10" rx="2" fill=${swatch(node)}></rect>`}</svg>
    <span>${plural(node.tokens, "token")}</span><span class="who">${node.holders > 1 ? `${node.holders} share it` : "one conversation"}${node.running ? `, ${node.running} running` : `, ${rest(node.idle)}`}</span>
  </button></div>
  ${node.children.length && isOpen(node, level) ? html`<ul>${family(node.number, node.children, level + 1)}</ul>` : nothing}</li>`;

const dark = matchMedia("(prefers-color-scheme: dark)");
const swatch = (node) => (node.holders > 1 ? (dark.matches ? "#fabe46" : "#e28e00") : `rgb(${colourOf(ownerOf(node), dark.matches).join(" ")})`);

const rest = (idle) => (idle < 1 ? "just used" : `idle for ${seconds(idle)}`);

const describe = (node) =>
  `${node.replica ? `${node.replica}: ` : ""}tokens ${count(node.start)} to ${count(node.start + node.tokens)}, ${node.holders > 1 ? `${node.holders} share it` : "one conversation's own"}, ${node.running ? `${node.running} running` : rest(node.idle)}`;

function select(number) {
  view.selected = view.selected === number ? null : number;
  view.text = view.copies = null;
  draw();
  if (view.selected !== null) document.getElementById("detail")?.scrollIntoView({ block: "nearest" });
}

function detail() {
  if (view.selected === null) return html`<section id="detail"><h2>A prefix</h2><p class="note">Choose one, in the list or in the picture, to see who shares it.</p></section>`;
  const node = view.tree.nodes.get(view.selected);
  if (!node) return html`<section id="detail"><h2>A prefix</h2><p>It has left the live cache.</p></section>`;
  const holders = holdersOf(node);
  return html`<section id="detail" aria-labelledby="detail-title"><h2 id="detail-title">The chosen prefix</h2>
    <dl>
      <dt>Tokens</dt><dd>${count(node.start)} to ${count(node.start + node.tokens)} (${count(node.tokens)})</dd>
      <dt>Lives in</dt><dd>the live cache${node.replica ? ` of ${node.replica}` : ""}, ${bytes(node.tokens * view.snapshot.pool.cell_bytes)}${view.copies === null ? nothing : `; ${copyWords(node, view.copies)}`}</dd>
      <dt>Held by</dt><dd>${plural(node.holders, "sequence")}${holders.length ? `: ${holders.slice(0, 24).join(", ")}${holders.length > 24 ? " …" : ""}` : ""}</dd>
      <dt>Hits</dt><dd>${plural(node.hits, "request")} found it here</dd>
      <dt>Saves</dt><dd>${saving(node)}</dd>
      <dt>Now</dt><dd>${node.running ? `${node.running} running on it` : rest(node.idle)}</dd>
    </dl>
    ${view.text ? html`<pre tabindex="0" aria-label="What the prefix says">${view.text}</pre>` : html`<p><button type="button" @click=${showText}>Show what it says</button> <span class="note">needs the admin key</span></p>`}
  </section>`;
}

const PLACES = { RAM: "in RAM", disk: "on disk" };

/** Which tiers hold how much of a prefix beside the live cache; it may have been split since they were asked. */
function copyWords(node, copies) {
  const held = Object.entries(copies).filter(([, tokens]) => tokens);
  const words = held.map(([tier, tokens]) => `${plural(Math.min(tokens, node.tokens), "token")} ${PLACES[tier] ?? `in ${tier}`}`);
  return words.length ? `copies of ${words.join(", ")}` : "no copy in a tier yet";
}

const saving = (node) =>
  view.snapshot.pool.layout === "unified" ? plural((node.holders - 1) * node.tokens, "cell") : "computing: in this layout each has a copy of its own";

async function showText() {
  const number = view.selected;
  try {
    const found = await (await ask(`v1/admin/prefixes/${number}`)).json();
    if (view.selected !== number) return;
    view.copies = { RAM: found.ram_tokens, ...found.slow_tokens };
    view.text = found.text + (found.tokens > found.tokens_shown ? ` … (${plural(found.tokens - found.tokens_shown, "token")} more)` : "");
  } catch (error) {
    if (error.status === 401) openKey();
    view.text = error.status === 404 ? "What people wrote stays hidden: this server has no admin key, or the prefix has gone." : `Not shown: ${error.message}`;
  }
  draw();
}

// Lists

const UNITS = { tokens: (n) => plural(n, "token"), bytes, blocks: (n) => plural(n, "block"), times: (n) => (n === 1 ? "" : `${count(n)} times:`) };

const happenings = ({ happenings: list }) => html`
  <section aria-labelledby="happenings-title"><h2 id="happenings-title">As it happens</h2>
    ${list.length ? html`<ol class="happenings">${list.slice(0, 14).map(([, ago, kind, amount, unit, text]) => html`
      <li><span class="kind ${kind}">${kind}</span> ${UNITS[unit](amount)} ${text} <span class="note">${seconds(Math.max(ago, 1))} ago</span></li>`)}</ol>` : html`<p class="note">No evictions, no moves between tiers yet.</p>`}
  </section>`;

const namespaces = ({ namespaces: rows, pool: p }) => rows.length < 2 ? nothing : html`
  <section aria-labelledby="tenants-title"><h2 id="tenants-title">${plural(p.namespaces, "tenant")}, each sharing with itself alone</h2>
    <div class="scroll" tabindex="0" role="region" aria-label="Tenants"><table>
      <thead><tr><th scope="col">Tenant</th><th scope="col">Live cells</th><th scope="col">Shared</th><th scope="col">Sequences</th><th scope="col">Tokens reused</th><th scope="col">Computed</th></tr></thead>
      <tbody>${rows.map(([number, cells, shared, n, hit, missed]) => html`<tr><th scope="row">${number}</th><td>${count(cells)}</td><td>${percent(shared, cells)}</td><td>${count(n)}</td><td>${compact(hit)} (${percent(hit, hit + missed)})</td><td>${compact(missed)}</td></tr>`)}</tbody>
    </table></div>
  </section>`;

const sequences = ({ sequences: rows }) => html`
  <details class="sequences" @toggle=${(event) => { view.listed = event.target.open; draw(); }}><summary>${plural(rows.length, "sequence")} in the live cache</summary>
    <div></div>
  </details>`;

const sequenceTable = (rows) => html`<div class="scroll" tabindex="0" role="region" aria-label="Sequences"><table>
      <thead><tr><th scope="col">Sequence</th><th scope="col">State</th><th scope="col">Tokens</th><th scope="col">Shared</th><th scope="col">Idle</th></tr></thead>
      <tbody>${rows.map(([id, state, tokens, shared, idle]) => html`<tr><th scope="row">${id}</th><td>${state}</td><td>${count(tokens)}</td><td>${percent(shared, tokens)}</td><td>${idle ? seconds(idle) : ""}</td></tr>`)}</tbody>
    </table></div>`;

// The conversations that the server keeps: asked for when somebody looks, a page at a time, and drawn then alone

const KEPT_PAGE = 25;

const sessions = () => html`
  <details class="kept" @toggle=${(event) => { kept.open = event.target.open; showKept(0); }}><summary>Conversations that the server keeps, and where they are</summary>
    <div></div>
  </details>`;

async function showKept(offset) {
  if (kept.open) {
    try {
      const found = await (await ask(`v1/admin/sessions?limit=${KEPT_PAGE}&offset=${offset}`)).json();
      Object.assign(kept, { offset, total: found.total, rows: found.data, note: "" });
    } catch (error) {
      if (error.status === 401) openKey();
      const note = error.status === 404 ? "Whose conversations the server keeps stays hidden: it has no admin key." : `Not shown: ${error.message}`;
      Object.assign(kept, { rows: [], note });
    }
  }
  const list = page.querySelector(".kept > div");
  if (list) render(kept.open ? keptTable() : nothing, list);
}

const keptTable = () => kept.note ? html`<p class="note">${kept.note} <button type="button" class="quiet" @click=${() => showKept(0)}>Try again</button></p>` : html`
  <p class="facts">${kept.rows.length ? html`${count(kept.offset + 1)} to ${count(kept.offset + kept.rows.length)} of ` : nothing}<strong>${count(kept.total)}</strong>, last used first
    <button type="button" class="quiet" ?disabled=${!kept.offset} @click=${() => showKept(Math.max(0, kept.offset - KEPT_PAGE))}>later</button>
    <button type="button" class="quiet" ?disabled=${kept.offset + kept.rows.length >= kept.total} @click=${() => showKept(kept.offset + KEPT_PAGE)}>earlier</button>
    <button type="button" class="quiet" @click=${() => showKept(kept.offset)}>look again</button></p>
  <div class="scroll" tabindex="0" role="region" aria-label="Conversations"><table>
    <thead><tr><th scope="col">Conversation</th><th scope="col">Where</th><th scope="col">Tenant</th><th scope="col">Tokens</th><th scope="col">Idle</th><th scope="col">Requests</th><th scope="col">Tokens reused</th></tr></thead>
    <tbody>${kept.rows.map((s) => html`<tr><th scope="row">${s.name ?? s.id}${s.pinned ? " (pinned)" : ""}</th><td>${whereWords(s)}</td><td>${s.tenant}</td><td>${count(s.n_tokens)}</td>
      <td>${seconds(s.idle_seconds)}</td><td>${count(s.usage.requests)}</td><td>${compact(s.usage.cached_tokens)} (${percent(s.usage.cached_tokens, s.usage.prompt_tokens)})</td></tr>`)}</tbody>
  </table></div>`;

/** How much of a conversation each tier has: of one that rests, the live cache may still have the beginning, for others. */
function whereWords({ tiers, n_tokens: all }) {
  if (tiers === null) return "not known";
  const words = Object.entries(tiers).filter(([, tokens]) => tokens).map(([tier, tokens]) => `${tier === "ram" ? "RAM" : tier} ${percent(tokens, all)}`);
  return words.join(", ") || "nowhere: it would be computed again";
}

addEventListener("resize", draw);
draw();
follow(onSnapshot, (state) => {
  view.state = state;
  draw();
});
