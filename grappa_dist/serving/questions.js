"use strict";
const byId = (id) => document.getElementById(id);
const keys = { s: "same", d: "different", u: "unsure" };
let questions = [];
let at = 0; // number of the question that is shown; as many as there are: the end
let busy = false; // an answer is on its way to the file

function say(text, failed = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("error", failed);
}

async function asked(path, body) {
  const options = body === undefined ? {} : { method: "POST", body: JSON.stringify(body) };
  const answer = await fetch(path, options);
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error);
  return found;
}

function place(word) {
  return "images/" + word;
}

function show() {
  const ended = at >= questions.length;
  byId("asking").hidden = ended;
  byId("end").hidden = !ended;
  byId("end").querySelector("h2").textContent = ended ? "All questions are answered" : "So far";
  byId("again").hidden = !ended;
  byId("early").hidden = ended || at === 0;
  byId("back").disabled = at === 0;
  const answered = questions.filter((question) => question.answer !== null).length;
  byId("done").style.width = (100 * answered) / questions.length + "%";
  if (ended) {
    say("");
    showResult();
    return;
  }
  const { images, answer } = questions[at];
  byId("left").src = place(images[0]);
  byId("right").src = place(images[1]);
  for (const button of document.querySelectorAll("[data-answer]"))
    button.classList.toggle("chosen", button.dataset.answer === answer);
  say(`Question ${at + 1} of ${questions.length}`);
  for (const next of questions.slice(at + 1, at + 4)) for (const word of next.images) new Image().src = place(word);
}

async function showResult() {
  byId("result").textContent = "…";
  try {
    byId("result").textContent = (await asked("result")).text;
  } catch (error) {
    say(`no result: ${error.message}`, true);
  }
}

async function give(answer) {
  if (busy || at >= questions.length) return;
  busy = true;
  try {
    await asked("questions/" + at, { answer });
    questions[at].answer = answer;
    const next = questions.findIndex((question, number) => number > at && question.answer === null);
    at = next < 0 ? questions.length : next;
    show();
  } catch (error) {
    say(`not kept, answer again: ${error.message}`, true);
  }
  busy = false;
}

function back() {
  if (busy || at === 0) return;
  at -= 1;
  show();
}

async function finish() {
  try {
    await asked("finish", {});
    say("Finished: the command has printed the result, and this page may be closed.");
    for (const button of document.querySelectorAll("button")) button.disabled = true;
  } catch (error) {
    say(`no answer from the command (${error.message})`, true);
  }
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const key = event.key.toLowerCase();
  if (key in keys) give(keys[key]);
  else if (key === "b" || event.key === "Backspace") back();
});
for (const button of document.querySelectorAll("[data-answer]"))
  button.addEventListener("click", () => give(button.dataset.answer));
for (const id of ["back", "again"]) byId(id).addEventListener("click", back);
for (const id of ["left", "right"])
  byId(id).addEventListener("error", () => say("an image cannot be read: answer unsure", true));
byId("finish").addEventListener("click", finish);
byId("so-far").addEventListener("click", () => {
  byId("end").hidden = false;
  showResult();
});

(async () => {
  try {
    questions = (await asked("questions")).questions;
    const open = questions.findIndex((question) => question.answer === null);
    at = open < 0 ? questions.length : open;
    show();
  } catch (error) {
    say(`no answer from the command (${error.message})`, true);
  }
})();
