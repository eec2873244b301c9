"use strict";
// The maps of a page that map_page.py writes. Every coordinate is in 0..65535; a view is the part of a map that is seen.
(() => {
  const LAST = 65535, CELLS = 128, NEAR_PX = 14, FOUND = 20;
  const byId = (id) => document.getElementById(id);
  const state = byId("state"), tip = byId("tip"), search = byId("search"), together = byId("together");
  let about, names, lower, points, groups, pictured, pictureOf, colours = [], order, chosen = -1, hovered = -1;
  let active = null; // which images are in colour, as 0 and 1; null: all
  const picked = new Set(); // groups
  const sheets = [];
  let planes = [];

  async function unpack(id) {
    const coded = atob(byId(id).textContent), bytes = new Uint8Array(coded.length);
    for (let i = 0; i < bytes.length; i++) bytes[i] = coded.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).arrayBuffer();
  }
  const unpackText = async (id) => JSON.parse(new TextDecoder().decode(await unpack(id)));

  async function load() {
    about = await unpackText("about");
    const [xy, tasks, labels, shown, list] = await Promise.all([
      unpack("points"), unpack("tasks"), unpack("labels"), unpack("pictured"), unpackText("names")]);
    const all = new Uint16Array(xy), n = about.count;
    points = about.models.map((_, m) => ({x: all.subarray(2 * m * n, (2 * m + 1) * n), y: all.subarray((2 * m + 1) * n, (2 * m + 2) * n)}));
    groups = {task: new Int32Array(tasks), class: new Int32Array(labels)};
    names = list;
    pictured = new Uint32Array(shown);
    pictureOf = new Int32Array(n).fill(-1);
    pictured.forEach((row, place) => { pictureOf[row] = place; });
    order = shuffled(n);
  }

  // Every image once, neighbours in the list far apart, so that no class is drawn over all others.
  function shuffled(n) {
    const found = new Uint32Array(n);
    let step = Math.max(1, Math.floor(n * 0.618));
    const divisor = (a, b) => (b ? divisor(b, a % b) : a);
    while (divisor(step, n) !== 1) step++;
    for (let i = 0, at = 0; i < n; i++, at = (at + step) % n) found[i] = at;
    return found;
  }

  // Images by the cell of a grid in which they lie, for what is near the pointer.
  function grid({x, y}) {
    const cell = (i) => (y[i] * CELLS >> 16) * CELLS + (x[i] * CELLS >> 16);
    const starts = new Uint32Array(CELLS * CELLS + 1), items = new Uint32Array(x.length);
    for (let i = 0; i < x.length; i++) starts[cell(i) + 1]++;
    for (let c = 0; c < CELLS * CELLS; c++) starts[c + 1] += starts[c];
    const next = starts.slice();
    for (let i = 0; i < x.length; i++) items[next[cell(i)]++] = i;
    return {starts, items};
  }

  function nearest(plane, x, y, radius) {
    const {starts, items} = plane.grid, at = plane.points, clamp = (v) => Math.max(0, Math.min(CELLS - 1, Math.floor(v * CELLS / 65536)));
    let best = -1, least = radius * radius;
    for (let row = clamp(y - radius); row <= clamp(y + radius); row++) {
      const first = row * CELLS + clamp(x - radius), last = row * CELLS + clamp(x + radius);
      for (let k = starts[first]; k < starts[last + 1]; k++) {
        const i = items[k], d = (at.x[i] - x) ** 2 + (at.y[i] - y) ** 2;
        if (d <= least && (!active || active[i])) { least = d; best = i; }
      }
    }
    return best;
  }

  function nearestPictured(plane, image) {
    const {x, y} = plane.points;
    let best = -1, least = Infinity;
    for (const i of pictured) {
      const d = (x[i] - x[image]) ** 2 + (y[i] - y[image]) ** 2;
      if (d < least) { least = d; best = i; }
    }
    return best;
  }

  // Colours -------------------------------------------------------------------------------------------------------
  const pixel = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  function colourOf(variable, alpha = 255) {
    pixel.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(variable).trim();
    pixel.fillRect(0, 0, 1, 1);
    const [r, g, b] = pixel.getImageData(0, 0, 1, 1).data;
    return ((alpha << 24) | (b << 16) | (g << 8) | r) >>> 0; // as the pixels of a canvas lie in memory
  }

  function groupNames() { return byId("colours").value === "class" ? about.classes : about.tasks; }

  // The groups by size; the largest eight have colours of their own, and then these repeat.
  function listGroups() {
    const of = groups[byId("colours").value], sizes = new Map();
    for (const g of of) sizes.set(g, (sizes.get(g) || 0) + 1);
    const ranked = [...sizes].sort((a, b) => b[1] - a[1] || a[0] - b[0]), list = byId("groups");
    colours = new Map();
    let rank = 0;
    list.replaceChildren(...ranked.map(([group, size]) => {
      const colour = group < 0 ? "--muted" : `--c${rank++ % 8}`;
      colours.set(group, colour);
      const button = document.createElement("button"), dot = document.createElement("i"), count = document.createElement("small");
      button.type = "button";
      dot.style.background = `var(${colour})`;
      count.textContent = size.toLocaleString("en");
      button.append(dot, group < 0 ? "no label" : groupNames()[group], count);
      button.setAttribute("aria-pressed", "false");
      button.addEventListener("click", () => {
        picked.has(group) ? picked.delete(group) : picked.add(group);
        button.setAttribute("aria-pressed", String(picked.has(group)));
        choose();
      });
      return button;
    }));
  }

  // Which images are in colour: of the groups that are picked, with names that have the words that are searched.
  function choose() {
    const of = groups[byId("colours").value], words = search.value.trim().toLowerCase(), list = byId("found");
    active = picked.size || words ? new Uint8Array(about.count) : null;
    if (words && !lower) lower = names.map((name) => name.toLowerCase());
    let count = about.count;
    const hits = [];
    if (active) {
      count = 0;
      for (let i = 0; i < active.length; i++) {
        if ((!picked.size || picked.has(of[i])) && (!words || lower[i].includes(words))) {
          active[i] = 1;
          count++;
          if (words && hits.length < FOUND) hits.push(i);
        }
      }
    }
    list.hidden = !hits.length;
    list.replaceChildren(...hits.map((image) => {
      const item = document.createElement("li"), button = document.createElement("button");
      button.type = "button";
      button.textContent = names[image];
      button.addEventListener("click", () => { select(image); planes.forEach((plane) => plane.center(image)); });
      item.append(button);
      return item;
    }));
    state.textContent = active ? `${count.toLocaleString("en")} of ${about.count.toLocaleString("en")} images` : "";
    drawAll();
  }

  // One map -------------------------------------------------------------------------------------------------------
  function makePlane(box, model) {
    const [base, over] = box.querySelectorAll("canvas"), plane = {box, model, points: points[model], view: null};
    const fingers = new Map();
    let moved = 0;
    plane.grid = grid(plane.points);
    const all = () => ({x: LAST / 2, y: LAST / 2, span: LAST * 1.06}); // its middle, and its width
    plane.view = all();
    plane.resize = () => {
      plane.ratio = Math.min(2, window.devicePixelRatio || 1);
      plane.side = Math.max(1, box.clientWidth);
      plane.pixels = Math.round(plane.side * plane.ratio);
      for (const canvas of [base, over]) canvas.width = canvas.height = plane.pixels;
    };
    plane.draw = () => {
      const {x, y} = plane.points, {view, pixels} = plane, context = base.getContext("2d");
      const image = context.createImageData(pixels, pixels), out = new Uint32Array(image.data.buffer);
      const scale = pixels / view.span, left = view.x - view.span / 2, top = view.y - view.span / 2;
      const radius = Math.min(6, (about.count > 20000 ? 0.7 : about.count > 3000 ? 1.3 : 2.6) * (LAST / view.span) ** 0.35) * plane.ratio;
      const stamp = [], reach = Math.ceil(radius);
      for (let dy = -reach; dy <= reach; dy++) {
        for (let dx = -reach; dx <= reach; dx++) if (dx * dx + dy * dy <= radius * radius) stamp.push([dx, dy]);
      }
      const table = new Map([...colours].map(([group, name]) => [group, colourOf(name)])), faint = colourOf("--muted", 46);
      const of = groups[byId("colours").value];
      for (let pass = active ? 0 : 1; pass < 2; pass++) {
        for (const i of order) {
          if (active && active[i] !== pass) continue;
          const px = Math.round((x[i] - left) * scale), py = Math.round((y[i] - top) * scale);
          if (px < 0 || py < 0 || px >= pixels || py >= pixels) continue;
          const colour = pass ? table.get(of[i]) : faint;
          for (const [dx, dy] of stamp) {
            const u = px + dx, v = py + dy;
            if (u >= 0 && v >= 0 && u < pixels && v < pixels) out[v * pixels + u] = colour;
          }
        }
      }
      context.putImageData(image, 0, 0);
      plane.mark();
    };
    plane.mark = () => {
      const context = over.getContext("2d"), {x, y} = plane.points, {view, pixels} = plane;
      context.clearRect(0, 0, pixels, pixels);
      const ink = getComputedStyle(document.documentElement);
      for (const [image, colour, radius] of [[chosen, "--accent", 9], [hovered, "--ink", 7]]) {
        if (image < 0) continue;
        const px = ((x[image] - view.x) / view.span + 0.5) * pixels, py = ((y[image] - view.y) / view.span + 0.5) * pixels;
        for (const [width, stroke] of [[5, "--card"], [2.5, colour]]) {
          context.beginPath();
          context.arc(px, py, radius * plane.ratio, 0, 7);
          context.lineWidth = width * plane.ratio;
          context.strokeStyle = ink.getPropertyValue(stroke).trim();
          context.stroke();
        }
      }
    };
    plane.center = (image) => {
      plane.view = {x: plane.points.x[image], y: plane.points.y[image], span: Math.min(plane.view.span, LAST / 4)};
      schedule(plane);
    };
    const move = (change) => {
      for (const other of together.checked ? planes : [plane]) {
        const {x, y, span} = change(other.view);
        const inside = (v) => Math.max(0, Math.min(LAST, v));
        other.view = {x: inside(x), y: inside(y), span: Math.max(LAST / 400, Math.min(LAST * 1.5, span))};
        schedule(other);
      }
    };
    const zoomAt = (factor, fx = 0, fy = 0) => move(({x, y, span}) => {
      const next = Math.max(LAST / 400, Math.min(LAST * 1.5, span / factor));
      return {x: x + fx * (span - next), y: y + fy * (span - next), span: next};
    });
    const place = (event) => { // of the pointer: as a share of the map from its middle, and in coordinates
      const frame = box.getBoundingClientRect(), fx = (event.clientX - frame.left) / frame.width - 0.5, fy = (event.clientY - frame.top) / frame.height - 0.5;
      return {fx, fy, x: plane.view.x + fx * plane.view.span, y: plane.view.y + fy * plane.view.span};
    };
    const under = (event) => { const {x, y} = place(event); return nearest(plane, x, y, NEAR_PX * plane.view.span / plane.side); };
    box.addEventListener("wheel", (event) => {
      event.preventDefault();
      const {fx, fy} = place(event);
      zoomAt(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0016)), fx, fy);
    }, {passive: false});
    box.addEventListener("pointerdown", (event) => {
      if (event.target.closest("button")) return;
      if (!fingers.size) moved = 0;
      fingers.set(event.pointerId, event);
      box.setPointerCapture(event.pointerId);
    });
    box.addEventListener("pointermove", (event) => {
      const before = fingers.get(event.pointerId);
      if (!before) { hover(plane, under(event), event); return; }
      const dx = event.clientX - before.clientX, dy = event.clientY - before.clientY;
      moved += Math.abs(dx) + Math.abs(dy);
      if (fingers.size === 2) {
        const other = [...fingers.values()].find((finger) => finger.pointerId !== event.pointerId);
        const apart = (finger) => Math.hypot(finger.clientX - other.clientX, finger.clientY - other.clientY);
        const {fx, fy} = place(other);
        zoomAt(apart(event) / Math.max(1, apart(before)), fx, fy);
      } else if (moved > 3) {
        move(({x, y, span}) => ({x: x - dx * span / plane.side, y: y - dy * span / plane.side, span}));
      }
      fingers.set(event.pointerId, event);
    });
    box.addEventListener("pointerup", (event) => {
      if (fingers.delete(event.pointerId) && moved <= 3) select(under(event), plane);
    });
    box.addEventListener("pointercancel", (event) => fingers.delete(event.pointerId));
    box.addEventListener("pointerleave", () => hover(plane, -1));
    box.addEventListener("keydown", (event) => {
      const step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
      if (event.target !== box || event.ctrlKey || event.metaKey || event.altKey) return;
      if (step) move(({x, y, span}) => ({x: x + step[0] * span / 10, y: y + step[1] * span / 10, span}));
      else if (event.key === "+" || event.key === "=") zoomAt(1.4);
      else if (event.key === "-") zoomAt(1 / 1.4);
      else if (event.key === "0") move(all);
      else if (event.key === "Enter" || event.key === " ") select(nearest(plane, plane.view.x, plane.view.y, plane.view.span), plane);
      else return;
      event.preventDefault();
    });
    for (const button of box.querySelectorAll("button")) {
      button.addEventListener("click", () => {
        const how = button.dataset.zoom;
        how === "all" ? move(all) : zoomAt(how === "in" ? 1.6 : 1 / 1.6);
      });
    }
    return plane;
  }

  const waiting = new Set();
  function schedule(plane) {
    if (!waiting.size) requestAnimationFrame(() => { const due = [...waiting]; waiting.clear(); due.forEach((one) => one.draw()); });
    waiting.add(plane);
  }
  const drawAll = () => planes.forEach(schedule);

  // Images --------------------------------------------------------------------------------------------------------
  function sheet(number) {
    if (!sheets[number]) {
      sheets[number] = new Promise((resolve) => {
        const image = new Image();
        image.onload = () => resolve(image);
        image.src = `data:image/webp;base64,${byId(`sheet-${number}`).textContent}`;
      });
    }
    return sheets[number];
  }

  // Draws the picture of an image; of one that has none, that of the nearest on this map. Returns that one, or -1.
  function drawPicture(canvas, image, plane) {
    const from = pictureOf[image] >= 0 ? image : nearestPictured(plane, image), context = canvas.getContext("2d");
    canvas.dataset.image = image;
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (from < 0) return -1;
    const {side, columns, perSheet} = about, place = pictureOf[from] % perSheet;
    sheet(Math.floor(pictureOf[from] / perSheet)).then((drawn) => {
      if (canvas.dataset.image !== String(image)) return; // another one meanwhile
      context.globalAlpha = from === image ? 1 : 0.55;
      context.drawImage(drawn, place % columns * side, Math.floor(place / columns) * side, side, side, 0, 0, canvas.width, canvas.height);
      canvas.dataset.drawn = image;
    });
    return from;
  }

  function describe(image, from) {
    const lines = [names[image]];
    const named = (list, number) => (number >= 0 && list.length ? list[number] : null);
    const task = about.tasks.length > 1 ? named(about.tasks, groups.task[image]) : null;
    const label = [named(about.classes, groups.class[image]), task].filter(Boolean).join(", ");
    if (label) lines.push(label);
    if (from >= 0 && from !== image) lines.push(`has no picture; nearest that has one: ${names[from]}`);
    return lines.join("\n");
  }

  function hover(plane, image, event) {
    if (image >= 0) {
      const from = drawPicture(tip.querySelector("canvas"), image, plane);
      tip.querySelector("canvas").hidden = from < 0;
      tip.querySelector("span").textContent = describe(image, from);
      tip.style.whiteSpace = "pre-line";
      tip.hidden = false;
      const {width, height} = tip.getBoundingClientRect();
      tip.style.left = `${Math.max(4, Math.min(window.innerWidth - width - 4, event.clientX + 16))}px`;
      tip.style.top = `${event.clientY + 18 + height > window.innerHeight ? Math.max(4, event.clientY - height - 14) : event.clientY + 18}px`;
    } else tip.hidden = true;
    if (image !== hovered) { hovered = image; planes.forEach((one) => one.mark()); }
  }

  function select(image, plane = planes[0]) {
    chosen = image;
    const text = byId("chosen"), canvas = byId("picture");
    text.style.whiteSpace = "pre-line";
    if (image < 0) {
      canvas.dataset.image = "";
      canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
      text.textContent = "Click a point, or a name that was found.";
    } else text.textContent = describe(image, drawPicture(canvas, image, plane));
    planes.forEach((one) => one.mark());
  }

  // -----------------------------------------------------------------------------------------------------------------
  function begin() {
    const select = byId("colours"), labelled = groups.class.some((label) => label >= 0);
    const kinds = [["task", about.tasks.length > 1 || !labelled], ["class", labelled]].filter(([, there]) => there);
    select.replaceChildren(...kinds.map(([kind]) => new Option(kind, kind)));
    planes = [...document.querySelectorAll(".plane")].map(makePlane);
    const resize = () => { planes.forEach((plane) => plane.resize()); drawAll(); };
    select.addEventListener("change", () => { picked.clear(); listGroups(); choose(); });
    search.addEventListener("input", choose);
    new ResizeObserver(resize).observe(document.querySelector(".both"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
    planes.forEach((plane) => plane.resize());
    listGroups();
    choose();
    requestAnimationFrame(() => requestAnimationFrame(() => { // drawn, and shown
      document.documentElement.dataset.ready = Math.round(performance.now());
    }));
  }

  load().then(begin).catch((error) => {
    state.textContent = `This browser cannot show the map: ${error.message}`;
    throw error;
  });
})();
