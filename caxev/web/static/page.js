// Keeps the parts of a page up to date. Without this the page works, and is as old as it was loaded.
"use strict";

const STALE = 45000; // milliseconds without a word from the server, which speaks every 15 s

const live = document.getElementById("live");
const view = document.body.dataset.view;
let heard = Date.now();
let source;

function swap(id, html) {
  const old = document.getElementById(id);
  if (!old) return false;
  const made = document.createElement("template");
  made.innerHTML = html;
  const fresh = made.content.firstElementChild;
  keep(old, fresh);
  old.replaceWith(fresh);
  ages(fresh);
  return true;
}

// What a reader has opened stays open, what they have typed stays, and the focus is where it was.
function keep(old, fresh) {
  for (const one of old.querySelectorAll("details[open][id]")) {
    const same = fresh.querySelector("#" + CSS.escape(one.id));
    if (same) same.open = true;
  }
  for (const one of old.querySelectorAll("input[name]:not([type=hidden]), select[name]")) {
    const same = fresh.querySelector(`${one.tagName}[name="${CSS.escape(one.name)}"]`);
    if (same) same.value = one.value;
  }
  const focus = document.activeElement;
  if (!focus || focus === old || !old.contains(focus)) return;
  const href = focus.getAttribute("href");
  const alike = (root) =>
    [...root.querySelectorAll(focus.tagName)].filter(
      (one) => one.id === focus.id && one.name === focus.name && one.getAttribute("href") === href,
    );
  const same = alike(fresh)[alike(old).indexOf(focus)];
  requestAnimationFrame(() => same?.focus({ preventScroll: true }));
}

// Rows of a list: those that are there are replaced; a new run goes on top of the newest.
function rows(list) {
  const body = document.querySelector("tbody[data-newest]");
  for (const { id, html, fresh } of list) {
    if (!swap(id, html) && fresh && body && body.dataset.newest === "yes") {
      body.insertAdjacentHTML("afterbegin", html);
      body.firstElementChild.classList.add("fresh");
      ages(body.firstElementChild);
    }
  }
}

async function reload() {
  const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
  if (answer.status === 401) location.reload(); // where people log in
  if (!answer.ok) return;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const fresh = document.importNode(page.querySelector("main"), true);
  const old = document.querySelector("main");
  keep(old, fresh);
  old.replaceWith(fresh);
  ages(fresh);
}

function age(seconds) {
  if (Math.abs(seconds) < 1) return "now"; // clocks differ by less than a second
  const ahead = seconds < 0;
  const n = Math.abs(seconds);
  const [value, unit] =
    n < 100 ? [n, "s"] : n < 7200 ? [n / 60, "min"] : n < 172800 ? [n / 3600, "h"] : [n / 86400, "days"];
  const text = `${Math.round(value)} ${unit}`;
  return ahead ? `in ${text}` : `${text} ago`;
}

function ages(root) {
  for (const one of root.querySelectorAll("time[datetime]:not([data-fixed])")) {
    const text = age((Date.now() - skew - Date.parse(one.dateTime)) / 1000);
    if (one.textContent !== text) one.textContent = text;
  }
}

function show(state, text) {
  if (live.dataset.state === state) return;
  live.dataset.state = state;
  live.lastElementChild.textContent = text;
}

function word(handle) {
  return (event) => {
    heard = Date.now();
    show("on", "live");
    if (event.data) handle(JSON.parse(event.data));
  };
}

function listen() {
  const seen = encodeURIComponent(document.body.dataset.seen);
  source = new EventSource(`/events?view=${encodeURIComponent(view)}&seen=${seen}`);
  source.addEventListener("parts", word((parts) => Object.entries(parts).forEach(([id, html]) => swap(id, html))));
  source.addEventListener("rows", word(rows));
  source.addEventListener("reload", word(reload));
  source.addEventListener("alive", word(() => {}));
  source.onerror = () => {
    show("off", "reconnecting");
    // The browser tries again by itself, unless the server has answered with an error.
    if (source.readyState === EventSource.CLOSED) setTimeout(() => reload().finally(listen), 15000);
  };
}

// The server's clock counts, not the reader's.
const skew = Date.now() - Date.parse(document.body.dataset.now);

// A page that nobody looks at costs the server nothing.
document.addEventListener("visibilitychange", () => {
  if (!view) return;
  if (document.hidden) source.close();
  else reload().finally(listen);
});

if (view) listen();
ages(document);
setInterval(() => {
  ages(document);
  if (view && Date.now() - heard > STALE) show("off", "no news");
}, 1000);
