"use strict";

const byId = (id) => document.getElementById(id);
let asked = 0; // answers to older pictures come too late
let last = null;

function say(text, isError = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("error", isError);
}

async function call(path, options = {}) {
  const headers = new Headers(options.headers);
  const token = byId("token").value.trim();
  if (token) headers.set("Authorization", `Bearer ${token}`);
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) byId("token-field").hidden = false;
  const document = await response.json();
  if (!response.ok) throw new Error(response.status === 401 ? "This server wants a token." : document.error);
  return document;
}

async function listStudents() {
  try {
    const { models } = await call("v2/models");
    byId("model").replaceChildren(...models.map(({ name }) => new Option(name, name)));
    say("");
    if (last) classify(last);
  } catch (error) {
    say(error.message, true);
  }
}

function row({ label, probability }) {
  const item = document.createElement("li");
  const name = document.createElement("span");
  name.className = "name";
  name.textContent = label;
  const bar = document.createElement("meter");
  bar.value = probability;
  bar.setAttribute("aria-label", label);
  const share = document.createElement("span");
  share.className = "share";
  share.textContent = `${(100 * probability).toFixed(1)} %`;
  item.append(name, bar, share);
  return item;
}

async function classify(file) {
  const turn = ++asked;
  last = file;
  const picture = byId("picture");
  if (picture.src) URL.revokeObjectURL(picture.src);
  picture.src = URL.createObjectURL(file);
  picture.alt = file.name || "The picture that is asked about";
  picture.hidden = false;
  byId("invitation").hidden = true;
  byId("answers").replaceChildren();
  say("Asking ...");
  const started = performance.now();
  try {
    const query = new URLSearchParams({ top_k: "5" });
    if (byId("model").value) query.set("model", byId("model").value);
    const headers = { "Content-Type": "application/octet-stream" };
    const answer = await call(`v1/classify?${query}`, { method: "POST", headers, body: file });
    if (turn !== asked) return;
    byId("answers").replaceChildren(...answer.predictions.map(row));
    say(`${answer.model}, version ${answer.version.slice(0, 12)}, in ${Math.round(performance.now() - started)} ms`);
  } catch (error) {
    if (turn === asked) say(error.message, true);
  }
}

function take(files) {
  const file = [...files].find((each) => each.type.startsWith("image/")) ?? files[0];
  if (file) classify(file);
}

const drop = byId("drop");
drop.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
drop.addEventListener("dragleave", () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  take(event.dataTransfer.files);
});
document.addEventListener("paste", (event) => take(event.clipboardData.files));
byId("file").addEventListener("change", (event) => take(event.target.files));
byId("model").addEventListener("change", () => last && classify(last));
byId("token").addEventListener("change", listStudents);
byId("ask").addEventListener("submit", (event) => event.preventDefault());
listStudents();
