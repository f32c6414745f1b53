// Embeddings, ranking, translation and entities: a form, one request, and its result.

import { ask } from "./api.js";
import { element, lines, onSend, shown, table } from "./dom.js";

/** Send a form with what `body` makes of it, and show what `show` makes of the answer. */
function panel(id, path, body, show) {
  const form = document.querySelector(`#${id} form`);
  const result = document.querySelector(`#${id} .result`);
  onSend(form, async (signal) => {
    result.replaceChildren();
    const sent = { model: form.elements.model.value, ...body(form.elements) };
    const answer = await ask(path, sent, signal);
    result.replaceChildren(...show(answer, sent));
    return answer.usage ? `Done: ${answer.usage.total_tokens} tokens.` : "Done.";
  });
}

function several(text) {
  const found = lines(text);
  if (!found.length) throw new Error("There is no text.");
  return found;
}

/** The cosine of the angle between two vectors. */
export function cosine(left, right) {
  let [dot, leftSquare, rightSquare] = [0, 0, 0];
  left.forEach((value, place) => {
    dot += value * right[place];
    leftSquare += value * value;
    rightSquare += right[place] * right[place];
  });
  return dot / Math.sqrt(leftSquare * rightSquare);
}

panel("embed", "v1/embeddings", ({ texts }) => ({ input: several(texts.value) }), ({ data }, { input }) => {
  const rows = data.map((row, place) => [
    element("th", { scope: "row", dir: "auto" }, `${place + 1}. ${input[place]}`),
    ...data.map((column) => heat(cosine(row.embedding, column.embedding))),
  ]);
  const caption = `Cosines of ${data.length} texts with ${data[0].embedding.length} dimensions; the stronger the colour, the closer.`;
  const found = table(caption, ["Text", ...data.map((_, place) => String(place + 1))], rows);
  found.className = "heat";
  return [found];
});

function heat(value) {
  const cell = element("td", { class: value < 0 ? "number negative" : "number" }, value.toFixed(3));
  cell.style.setProperty("--heat", `${Math.min(Math.abs(value), 1) * 100}%`);
  return cell;
}

panel(
  "rank",
  "v1/rerank",
  ({ query, texts }) => ({ query: query.value, documents: several(texts.value), return_documents: false }),
  ({ results }, { documents }) => [
    table(
      "Passages, best first.",
      ["Rank", "Score", "Passage", "Line"],
      results.map(({ index, relevance_score: score }, place) => [place + 1, score, documents[index], index + 1]),
    ),
  ],
);

panel(
  "translate",
  "v1/translate",
  ({ text, source_lang: from, target_lang: to }) => ({
    input: text.value,
    ...(from.value.trim() ? { source_lang: from.value.trim() } : {}),
    ...(to.value.trim() ? { target_lang: to.value.trim() } : {}),
  }),
  ({ data: [{ text, finish_reason: ended }] }) => [
    text,
    ...(ended === "length" ? [element("p", { class: "hint" }, "Cut at the limit of tokens.")] : []),
  ],
);

panel("entities", "v1/entities", ({ text }) => ({ input: text.value }), ({ data: [{ entities }] }, { input }) => {
  // Positions count code points; a string of JavaScript counts UTF-16's halves.
  const characters = Array.from(input);
  const between = (start, end) => characters.slice(start, end).join("");
  const marked = element("p", { class: "marked", dir: "auto" });
  let done = 0;
  for (const { entity, start, end } of entities) {
    if (start < done) continue; // it overlaps with the one before; the table has it
    const kind = element("span", { class: "kind" }, entity);
    marked.append(between(done, start), element("mark", {}, between(start, end), kind));
    done = end;
  }
  marked.append(between(done));
  const rows = entities.map(({ entity, score, start, end }) => [between(start, end), entity, shown(score)]);
  const caption = entities.length ? "The entities in their order." : "There are no entities.";
  return [marked, table(caption, ["Text", "Entity", "Score"], rows)];
});
