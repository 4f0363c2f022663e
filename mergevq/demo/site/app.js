// Encodes and decodes a picture with the graphs in `model/`; all of it in this browser.
import * as ort from "./runtime/ort.wasm.min.mjs";

const byId = (id) => document.getElementById(id);
const here = (path) => new URL(path, import.meta.url).href;
ort.env.wasm.numThreads = 1;  // More would need headers that plain servers do not send.
ort.env.wasm.wasmPaths = here("./runtime/");

const MAP_SIDE = 512;
let record, weights, decoder, recovery;
const encoders = new Map();
let picture = null;   // Bytes of the picture at the model's size, RGBA.
let result = null;    // Tokens and maps of what is shown.
let hovered = null;   // Cell that is pointed at.
let work = Promise.resolve();
let wanted = 0;       // Number of the latest request; older ones stop.

// ---------------------------------------------------------------------------- model

async function fetched(path) {
  const response = await fetch(here(path));
  if (!response.ok) throw new Error(`${path} is missing on this server (${response.status})`);
  return response;
}

async function session(name) {
  const graph = new Uint8Array(await (await fetched(`./model/${name}.onnx`)).arrayBuffer());
  return ort.InferenceSession.create(graph, {
    executionProviders: ["wasm"],
    externalData: [{ path: "weights.bin", data: weights }],
  });
}

async function encoder(kept) {
  if (!encoders.has(kept)) encoders.set(kept, session(`encoder_${kept}`));
  return encoders.get(kept);
}

async function load() {
  record = await (await fetched("./model/export.json")).json();
  weights = new Uint8Array(await (await fetched("./model/weights.bin")).arrayBuffer());
  [decoder, recovery] = [await session("decoder"), await session("recovery")];
  const counts = record.num_kept;
  const slider = byId("kept");
  slider.max = String(counts.length - 1);
  slider.value = String(Math.floor((counts.length - 1) / 2));
  slider.disabled = counts.length < 2;
  byId("marks").replaceChildren(...counts.map((count) => {
    const mark = document.createElement("span");
    mark.textContent = count;
    return mark;
  }));
  byId("side").textContent = `${record.image_size} × ${record.image_size}`;
  byId("model").textContent =
    `Model ${record.model.name} (${record.model.sha256.slice(0, 12)}), ${cells()} cells. ${record.licence}`;
  for (const id of ["input", "given", "recovered"]) {
    byId(id).width = byId(id).height = record.image_size;
  }
  drawExample();
}

const cells = () => record.grid_size[0] * record.grid_size[1];

// -------------------------------------------------------------------------- picture

// A sun over hills, so that the page shows something before a picture is chosen.
function drawExample() {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 256;
  const pen = canvas.getContext("2d");
  const sky = pen.createLinearGradient(0, 0, 0, 180);
  sky.addColorStop(0, "#2b5c9e");
  sky.addColorStop(1, "#f2c79b");
  pen.fillStyle = sky;
  pen.fillRect(0, 0, 256, 256);
  pen.fillStyle = "#fff0b8";
  pen.beginPath();
  pen.arc(178, 82, 30, 0, 7);
  pen.fill();
  for (const [colour, x, y, radius] of [["#41617a", 40, 300, 150], ["#2f4a3a", 210, 330, 170]]) {
    pen.fillStyle = colour;
    pen.beginPath();
    pen.arc(x, y, radius, 0, 7);
    pen.fill();
  }
  take(canvas, 256, 256);
}

// The middle square of a picture at the model's size.
function take(source, width, height) {
  const side = record.image_size;
  const square = Math.min(width, height);
  const pen = byId("input").getContext("2d", { willReadFrequently: true });
  pen.imageSmoothingQuality = "high";
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, side, side);
  pen.drawImage(source, (width - square) / 2, (height - square) / 2, square, square, 0, 0, side, side);
  picture = pen.getImageData(0, 0, side, side).data;
  request();
}

async function choose(file) {
  if (!file || !record) return;
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
  } catch {
    problem(`${file.name} is not a picture that this browser can read; choose a PNG, JPEG or WebP file.`);
    return;
  }
  problem("");
  take(bitmap, bitmap.width, bitmap.height);
  bitmap.close();
}

function problem(text) {
  byId("problem").textContent = text;
  byId("problem").hidden = !text;
}

function toTensor(bytes) {
  const area = record.image_size ** 2;
  const values = new Float32Array(3 * area);
  for (let pixel = 0; pixel < area; pixel++) {
    for (let channel = 0; channel < 3; channel++) {
      values[channel * area + pixel] = Math.fround(bytes[4 * pixel + channel] / 127.5) - 1;
    }
  }
  return new ort.Tensor("float32", values, [1, 3, record.image_size, record.image_size]);
}

// Draws an image in [-1, 1] and returns its PSNR beside the picture, in dB.
function draw(id, tensor) {
  const side = record.image_size;
  const area = side * side;
  const pen = byId(id).getContext("2d");
  const image = pen.createImageData(side, side);
  let squares = 0;
  for (let pixel = 0; pixel < area; pixel++) {
    for (let channel = 0; channel < 3; channel++) {
      const level = Math.round((Math.min(1, Math.max(-1, tensor.data[channel * area + pixel])) + 1) * 127.5);
      image.data[4 * pixel + channel] = level;
      squares += (level - picture[4 * pixel + channel]) ** 2;
    }
    image.data[4 * pixel + 3] = 255;
  }
  pen.putImageData(image, 0, 0);
  return 10 * Math.log10(255 ** 2 / (squares / (3 * area)));
}

// ----------------------------------------------------------------------------- work

function request() {
  const number = ++wanted;
  const kept = record.num_kept[Number(byId("kept").value)];
  byId("kept-shown").textContent = `${kept} of ${cells()}`;
  byId("kept").setAttribute("aria-valuetext", `${kept} of ${cells()} tokens`);
  work = work.then(() => (number === wanted ? run(kept) : null)).catch((error) => {
    problem(`The model could not be run: ${error.message}`);
  });
}

async function timed(model, feeds) {
  const start = performance.now();
  const results = await model.run(feeds);
  return [results, performance.now() - start];
}

async function run(kept) {
  byId("status").textContent = `Encoding with ${kept} tokens…`;
  await new Promise((resume) => setTimeout(resume));
  const model = await encoder(kept);
  const [{ indices, source }, encoding] = await timed(model, { image: toTensor(picture) });
  const [given, decoding] = await timed(decoder, { indices, source });
  const [inferred, recovering] = await timed(recovery, { indices });
  const [recovered, again] = await timed(decoder, { indices, source: inferred.source });
  const quality = { given: draw("given", given.image), recovered: draw("recovered", recovered.image) };
  result = {
    num_kept: kept,
    indices: Array.from(indices.data, Number),
    source: Array.from(source.data, Number),
    recovered: Array.from(inferred.source.data, Number),
  };
  hovered = null;
  drawMap();
  showNumbers(kept, quality, { given: encoding + decoding, recovered: encoding + recovering + again });
  byId("save").disabled = false;
  byId("status").textContent = `Done: ${kept} of ${cells()} tokens.`;
}

function showNumbers(kept, quality, times) {
  const bits = record.bits[record.num_kept.indexOf(kept)];
  const pixels = record.image_size ** 2;
  const whole = (number) => Math.ceil(number).toLocaleString("en");
  for (const side of ["given", "recovered"]) {
    const total = bits.tokens + (side === "given" ? bits.source : 0);
    byId(`psnr-${side}`).textContent = `${quality[side].toFixed(2)} dB`;
    byId(`bpp-${side}`).textContent = (total / pixels).toFixed(3);
    byId(`time-${side}`).textContent = `${Math.round(times[side])} ms`;
  }
  byId("bits-tokens").textContent = byId("bits-tokens-2").textContent = whole(bits.tokens);
  byId("bits-source").textContent = whole(bits.source);
}

// ------------------------------------------------------------------------ merge map

function drawMap() {
  const [rows, columns] = record.grid_size;
  const canvas = byId("map");
  const pen = canvas.getContext("2d");
  const scale = Math.min(MAP_SIDE / rows, MAP_SIDE / columns);
  canvas.width = Math.round(columns * scale);
  canvas.height = Math.round(rows * scale);
  const colours = meanColours();
  const chosen = hovered === null ? null : result.source[hovered];
  for (let cell = 0; cell < rows * columns; cell++) {
    const [x, y] = [(cell % columns) * scale, Math.floor(cell / columns) * scale];
    const group = result.source[cell];
    pen.fillStyle = `rgb(${colours[group].join(" ")})`;
    pen.fillRect(x, y, scale + 1, scale + 1);
    if (chosen !== null && group !== chosen) {
      pen.fillStyle = "rgb(127 127 127 / 65%)";
      pen.fillRect(x, y, scale + 1, scale + 1);
    }
  }
  // Lines between groups, dark on light so that they show on every colour; in pink around the
  // group that is pointed at.
  const lines = [[5, "rgb(255 255 255 / 55%)", null], [2, "#111", null]];
  if (chosen !== null) lines.push([6, "#ff3d7f", chosen]);
  for (const [width, colour, only] of lines) {
    pen.lineWidth = width;
    pen.strokeStyle = colour;
    pen.beginPath();
    for (let cell = 0; cell < rows * columns; cell++) {
      const [column, row] = [cell % columns, Math.floor(cell / columns)];
      const differs = (other) => {
        const pair = [result.source[cell], result.source[other]];
        return pair[0] !== pair[1] && (only === null || pair.includes(only));
      };
      if (column + 1 < columns && differs(cell + 1)) {
        pen.moveTo((column + 1) * scale, row * scale);
        pen.lineTo((column + 1) * scale, (row + 1) * scale);
      }
      if (row + 1 < rows && differs(cell + columns)) {
        pen.moveTo(column * scale, (row + 1) * scale);
        pen.lineTo((column + 1) * scale, (row + 1) * scale);
      }
    }
    pen.stroke();
  }
  if (hovered !== null && document.activeElement === canvas) {
    pen.fillStyle = "#ff3d7f";
    pen.beginPath();
    pen.arc(((hovered % columns) + 0.5) * scale, (Math.floor(hovered / columns) + 0.5) * scale, scale / 5, 0, 7);
    pen.fill();
  }
}

// Mean colour of the picture under each group.
function meanColours() {
  const [rows, columns] = record.grid_size;
  const side = record.image_size;
  const sums = Array.from({ length: result.num_kept }, () => [0, 0, 0, 0]);
  for (let pixel = 0; pixel < side * side; pixel++) {
    const row = Math.floor((Math.floor(pixel / side) * rows) / side);
    const column = Math.floor(((pixel % side) * columns) / side);
    const sum = sums[result.source[row * columns + column]];
    for (let channel = 0; channel < 3; channel++) sum[channel] += picture[4 * pixel + channel];
    sum[3] += 1;
  }
  return sums.map((sum) => sum.slice(0, 3).map((value) => Math.round(value / sum[3])));
}

function point(cell) {
  if (!result || cell === hovered) return;
  hovered = cell;
  if (cell === null) {
    byId("group").textContent = "point at a group, or use the arrow keys";
  } else {
    const group = result.source[cell];
    const size = result.source.filter((each) => each === group).length;
    const number = `token ${group + 1} of ${result.num_kept}`;
    byId("group").textContent = `${number}: ${size} ${size === 1 ? "cell" : "cells"}`;
  }
  drawMap();
}

function cellAt(event) {
  const [rows, columns] = record.grid_size;
  const box = byId("map").getBoundingClientRect();
  const inside = (value, count) => Math.min(count - 1, Math.max(0, Math.floor(value * count)));
  return inside((event.clientY - box.top) / box.height, rows) * columns
    + inside((event.clientX - box.left) / box.width, columns);
}

function move(event) {
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  if (!result || (event.key !== "Escape" && !(event.key in steps))) return;
  event.preventDefault();
  if (event.key === "Escape") return point(null);
  const [rows, columns] = record.grid_size;
  const [down, right] = steps[event.key];
  if (hovered === null) return point(0);
  const row = Math.min(rows - 1, Math.max(0, Math.floor(hovered / columns) + down));
  const column = Math.min(columns - 1, Math.max(0, (hovered % columns) + right));
  point(row * columns + column);
}

// --------------------------------------------------------------------------- events

function save() {
  const text = JSON.stringify({ model: record.model.sha256, ...result });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = `tokens_${result.num_kept}.json`;
  link.click();
  URL.revokeObjectURL(link.href);
}

byId("file").addEventListener("change", (event) => choose(event.target.files[0]));
byId("kept").addEventListener("input", request);
byId("save").addEventListener("click", save);
byId("map").addEventListener("pointermove", (event) => point(cellAt(event)));
byId("map").addEventListener("pointerdown", (event) => point(cellAt(event)));
byId("map").addEventListener("pointerleave", () => point(null));
byId("map").addEventListener("keydown", move);
byId("map").addEventListener("blur", () => point(null));
const drop = byId("drop");
for (const name of ["dragover", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", name === "dragover");
    if (name === "drop") choose(event.dataTransfer.files[0]);
  });
}
document.addEventListener("dragleave", () => drop.classList.remove("over"));

load().catch((error) => {
  byId("status").textContent = "";
  problem(`The page could not be loaded: ${error.message}`);
});
