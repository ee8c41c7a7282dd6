// What the five pages share: elements, numbers as text, controls. A lesson adds two functions:
//   compute(given, data)         inputs -> numbers, or throws Refused
//   draw(given, numbers, data)   fills the parts of the page
"use strict";

class Refused extends Error {}

// ------------------------------------------------------------------------------- elements

const SVG = "http://www.w3.org/2000/svg";

// An element; what is inside is elements, or text that is never read as markup.
function element(name, cls, ...inside) {
  const made = document.createElement(name);
  if (cls) made.className = cls;
  made.append(...inside);
  return made;
}

// A part of a drawing.
function shape(name, attributes, ...inside) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...inside);
  return made;
}

function drawing(width, height, cls, label, ...inside) {
  const box = { viewBox: `0 0 ${width} ${height}`, class: cls, role: "img", "aria-label": label };
  return shape("svg", box, ...inside);
}

// Rows of cells: text, an element, or [text, class].
function table(heads, rows) {
  const cell = (name, value) => {
    const [inside, cls] = Array.isArray(value) ? value : [value, ""];
    return element(name, cls, inside);
  };
  const top = element("tr", "", ...heads.map((head) => cell("th", head)));
  const body = rows.map((row) => element("tr", "", ...row.map((value) => cell("td", value))));
  return element("div", "wide", element("table", "", top, ...body));
}

// Lines of arithmetic; what stands between stars is the result.
function byHand(...lines) {
  const shown = lines.map((line) => {
    const pieces = line.split("*").map((text, i) => (i % 2 ? element("b", "", text) : text));
    return element("p", "", ...pieces);
  });
  return element("div", "by-hand", ...shown);
}

function put(id, ...inside) {
  document.getElementById(id).replaceChildren(...inside);
}

// ------------------------------------------------------------------------------- numbers

const sum = (values) => values.reduce((total, value) => total + value, 0);
const range = (n) => [...Array(n).keys()];

// A number as text, with a minus sign as long as a plus sign.
function fixed(value, digits = 3) {
  if (value === null || !Number.isFinite(value)) return "–";
  const text = value.toFixed(digits);
  return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−");
}

const percent = (share) => fixed(100 * share, 0) + " %";

// Three digits, whatever the size.
function short(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e4 || size < 1e-3)) return value.toExponential(2).replaceAll("-", "−");
  return String(Number(value.toPrecision(3))).replace("-", "−");
}

// Whether two values agree, but for rounding.
function same(a, b) {
  if (typeof a === "number" && typeof b === "number") {
    return Math.abs(a - b) <= 1e-9 + 1e-6 * Math.max(Math.abs(a), Math.abs(b));
  }
  if (a === null || b === null || typeof a !== "object") return a === b;
  const keys = Object.keys(a);
  return keys.length === Object.keys(b).length && keys.every((key) => same(a[key], b[key]));
}

// The numbers of a lesson, or why there are none.
function answered(given, data) {
  try {
    return compute(given, data);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    return { refused: error.message };
  }
}

// ------------------------------------------------------------------------------- controls

function valueOf(control) {
  if (control.type === "checkbox") return control.checked;
  return ["range", "number"].includes(control.type) ? control.valueAsNumber : control.value;
}

// The example with what stands in the controls; a control's name is a path into it.
function read(form, example) {
  const given = JSON.parse(JSON.stringify(example));
  for (const control of form.elements) {
    if (!control.name) continue;
    const path = control.name.split(".");
    const last = path.pop();
    const place = path.reduce((inside, key) => inside[key], given);
    place[last] = valueOf(control);
  }
  return given;
}

function showValues(form) {
  for (const output of form.querySelectorAll("output")) {
    const value = output.parentElement.querySelector("input").valueAsNumber;
    output.textContent = "power" in output.dataset ? short(10 ** value) : short(value);
  }
}

// From now on the page follows its controls.
function begin(lesson) {
  const form = document.getElementById("controls");
  function show() {
    showValues(form);
    const ready = form.checkValidity();
    const given = read(form, lesson.example);
    const numbers = ready ? answered(given, lesson.data) : { refused: "A number is missing or out of range." };
    put("refused", numbers.refused || "");
    document.getElementById("figures").hidden = Boolean(numbers.refused);
    if (!numbers.refused) draw(given, numbers, lesson.data);
  }
  form.oninput = show;
  form.onsubmit = (event) => event.preventDefault();
  form.onreset = () => setTimeout(show);

  const agrees = same(answered(lesson.example, lesson.data), lesson.numbers);
  const checked = agrees
    ? "✓ For the example, this page's numbers are those that nanosail's own code gave. Now change them."
    : "✗ This page's numbers differ from those that nanosail's own code gave: a fault of this page.";
  put("checked", checked);
  document.getElementById("checked").className = agrees ? "soft" : "bad";
  show();
}
