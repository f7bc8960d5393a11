"use strict";
const table = document.getElementById("ops");
const bodies = Array.from(table.tBodies);
const search = document.getElementById("search");
const kind = document.getElementById("kind");
const bits = document.getElementById("bits");
const shown = document.getElementById("shown");
const openAll = document.getElementById("open");
const links = Array.from(document.querySelectorAll("[data-op]"));
const byName = new Map(bodies.map((body) => [body.dataset.name, body]));

function filter() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  for (const body of bodies) {
    const text = body.rows[0].textContent.toLowerCase();
    const keep = (!kind.value || body.dataset.kind === kind.value)
      && (!bits.value || body.dataset.bits.split("|").includes(bits.value))
      && words.every((word) => text.includes(word));
    body.hidden = !keep;
    count += keep;
  }
  shown.textContent = `${count} of ${bodies.length} ops`;
  for (const link of links) {
    const body = byName.get(link.dataset.op);
    link.classList.toggle("dim", Boolean(body && body.hidden));
  }
}

function sort(header) {
  const headers = Array.from(table.tHead.rows[0].cells);
  const column = headers.indexOf(header);
  const up = header.getAttribute("aria-sort") !== "ascending";
  for (const other of headers) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = (body) => body.rows[0].cells[column].textContent;
  const compare = new Intl.Collator("en", { numeric: true }).compare;
  const order = bodies.slice().sort((a, b) => compare(key(a), key(b)));
  table.append(...(up ? order : order.reverse()));
}

function show(name) {
  const body = byName.get(name);
  if (!body) return;
  if (body.hidden) {
    search.value = kind.value = bits.value = "";
    filter();
  }
  body.querySelector("details").open = true;
  body.scrollIntoView({ block: "start" });
  body.querySelector("summary").focus({ preventScroll: true });
}

function unfold(key) {
  const details = document.querySelector(`details[data-module="${key}"]`);
  details.open = true;
  details.scrollIntoView({ block: "start" });
  details.firstElementChild.focus({ preventScroll: true });
}

search.addEventListener("input", filter);
kind.addEventListener("change", filter);
bits.addEventListener("change", filter);
openAll.addEventListener("click", () => {
  const visible = bodies.filter((body) => !body.hidden).map((b) => b.querySelector("details"));
  const open = !visible.every((details) => details.open);
  for (const details of visible) details.open = open;
  openAll.textContent = open ? "Close all" : "Open all";
});
for (const header of table.tHead.rows[0].cells) {
  header.firstElementChild.addEventListener("click", () => sort(header));
}
const boxes = Array.from(document.querySelectorAll("g[data-module]"));
for (const link of [...links, ...boxes]) {
  const follow = () => (link.dataset.op ? show(link.dataset.op) : unfold(link.dataset.module));
  link.addEventListener("click", follow);
  link.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && link.tagName !== "BUTTON") follow();
  });
}
filter();
