// What both pages have around their content: the header, the key dialog, the word for how the connection is.

import { html, nothing } from "./lit-html.js";
import { announceKey, key, setKey } from "./server.js";

const STATES = {
  starting: "connecting",
  live: "live",
  lost: "connection lost, trying again",
  ended: "the server ended the stream, trying again",
  locked: "a key is needed",
  private: "ready; live numbers need the admin key",
  elsewhere: "live numbers are on the admin port",
  apart: "ready; live numbers are on the admin port",
};

export const header = ({ here, model, state, draining }) => html`
  <header>
    <a class="brand" href="./"><img src="web/icon.svg" alt="" width="28" height="28"> pasture</a>
    <span class="model">${model ?? ""}</span>
    <span class="state ${state}">${draining ? "draining" : STATES[state]}</span>
    <nav aria-label="Pages">
      <a href="./" aria-current=${here === "dashboard" ? "page" : nothing}>Dashboard</a>
      <a href="chat" aria-current=${here === "chat" ? "page" : nothing}>Chat</a>
      <button type="button" class="quiet" @click=${openKey}>Keys${key("api") || key("admin") ? " ✓" : "…"}</button>
    </nav>
  </header>`;

export const keyDialog = (changed) => html`
  <dialog id="key" aria-labelledby="key-title">
    <form method="dialog" @submit=${(event) => submit(event, changed)}>
      <h2 id="key-title">Keys</h2>
      <p>Kept until this tab is closed. An API key opens the chat. The admin key opens the live numbers where a server has one,
        and what prefixes say.</p>
      <label for="key-api">API key</label>
      <input id="key-api" type="password" autocomplete="off" .value=${key("api")}>
      <label for="key-admin">Admin key</label>
      <input id="key-admin" type="password" autocomplete="off" .value=${key("admin")}>
      <p class="buttons"><button value="save">Use it</button> <button value="cancel" class="quiet" formnovalidate>Cancel</button></p>
    </form>
  </dialog>`;

export function openKey() {
  const dialog = document.getElementById("key");
  if (dialog && !dialog.open) dialog.showModal();
}

function submit(event, changed) {
  if (event.submitter?.value === "cancel") return;
  for (const kind of ["api", "admin"]) setKey(kind, document.getElementById(`key-${kind}`).value.trim());
  announceKey();
  changed();
}

/** For screen readers, politely. */
export function speak(text) {
  document.getElementById("spoken").textContent = text;
}
