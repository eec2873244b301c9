"use strict";
// Names come from the data: they are only ever set as text.

const byId = (id) => document.getElementById(id);
let limits = null;
let asked = 0; // number of the last search: answers of earlier ones are dropped
let current = null; // the image that is searched for

function element(tag, text, properties = {}) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  return Object.assign(made, properties);
}

function say(text, failed = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("error", failed);
}

function percent(share) {
  return (100 * share).toFixed(1) + " %";
}

function showWeights(weights) {
  byId("weights").hidden = weights === null;
  if (weights === null) return;
  const bars = [];
  weights.sets.forEach((name, number) => {
    const track = element("span", undefined, { className: "track" });
    const bar = element("i");
    bar.style.width = percent(weights.mean[number]).replace(" ", "");
    track.append(bar);
    const drawn = element("dd");
    drawn.append(track);
    bars.push(element("dt", name), drawn, element("dd", percent(weights.mean[number])));
  });
  byId("bars").replaceChildren(...bars);
  const head = element("tr");
  head.append(...["layer", ...weights.sets].map((name) => element("th", name, { scope: "col" })));
  byId("layers").tHead.replaceChildren(head);
  const rows = weights.layers.map((layer, number) => {
    const row = element("tr");
    row.append(element("th", String(number + 1), { scope: "row" }));
    row.append(...layer.map((weight) => element("td", percent(weight))));
    return row;
  });
  byId("layers").tBodies[0].replaceChildren(...rows);
}

function hitItem(hit, isNew) {
  const item = element("li", undefined, { className: isNew ? "new" : "" });
  const link = element("a", undefined, { href: hit.image, target: "_blank", rel: "noopener" });
  link.append(element("img", undefined, { src: hit.thumbnail, alt: "", loading: "lazy" }));
  link.append(element("b", hit.cosine.toFixed(3)), element("br"), element("span", hit.name));
  const again = element("button", "search with this", { type: "button" });
  again.setAttribute("aria-label", "search with " + hit.name);
  again.addEventListener("click", () => searchAgain(hit));
  item.append(link, element("br"));
  if (isNew) item.append(element("small", "not in the other list"), element("br"));
  item.append(again);
  return item;
}

function showColumns(columns) {
  byId("columns").classList.toggle("single", columns.length === 1);
  const names = columns.map((column) => new Set(column.hits.map((hit) => hit.name)));
  const sections = columns.map((column, number) => {
    const section = element("section");
    const list = element("ol");
    list.append(
      ...column.hits.map((hit) =>
        hitItem(hit, names.some((others, other) => other !== number && !others.has(hit.name))),
      ),
    );
    section.append(element("h2", column.model), list);
    return section;
  });
  byId("columns").replaceChildren(...sections);
}

async function search(image, name) {
  const number = ++asked;
  if (limits !== null && image.size > limits.upload_bytes) {
    say(`${name}: the image has more than ${(limits.upload_bytes / 2 ** 20).toFixed(0)} MiB`, true);
    return;
  }
  current = { image, name };
  const shown = byId("query");
  URL.revokeObjectURL(shown.src);
  shown.src = URL.createObjectURL(image);
  shown.alt = "The query: " + name;
  shown.hidden = false;
  say("Searching …");
  try {
    const answer = await fetch("search?k=" + byId("hits").value, {
      method: "POST",
      body: image,
      headers: { "Content-Type": "application/octet-stream" },
    });
    const found = await answer.json();
    if (number !== asked) return;
    if (!answer.ok) {
      say(`${name}: ${found.error}`, true);
      return;
    }
    showWeights(found.weights);
    showColumns(found.columns);
    say(`${name}, ${found.query.width} × ${found.query.height} pixels`);
  } catch (error) {
    if (number === asked) say(`${name}: no answer from the server (${error.message})`, true);
  }
}

async function searchAgain(hit) {
  const answer = await fetch(hit.image);
  if (!answer.ok) {
    say(`${hit.name}: the image is no longer there`, true);
    return;
  }
  await search(await answer.blob(), hit.name);
  window.scrollTo({ top: 0 });
}

function searchFirst(files) {
  if (files.length > 0) search(files[0], files[0].name || "pasted image");
}

byId("file").addEventListener("change", (event) => {
  searchFirst([...event.target.files]);
  event.target.value = ""; // the same file may be chosen again
});
byId("hits").addEventListener("change", () => current && search(current.image, current.name));
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    byId("drop").classList.add("over");
  });
}
document.addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) byId("drop").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  byId("drop").classList.remove("over");
  if (event.dataTransfer.files.length === 0) say("Drop the file of an image, not a link to one", true);
  searchFirst([...event.dataTransfer.files]);
});
document.addEventListener("paste", (event) => searchFirst([...event.clipboardData.files]));

(async () => {
  try {
    const about = await (await fetch("about")).json();
    limits = about.limits;
    const counts = about.columns.map((column) => `${column.images.toLocaleString("en")} images under ${column.model}`);
    byId("about").textContent = counts.join(", ");
    for (const option of [...byId("hits").options]) if (Number(option.value) > limits.hits) option.remove();
  } catch (error) {
    say(`no answer from the server (${error.message})`, true);
  }
})();
