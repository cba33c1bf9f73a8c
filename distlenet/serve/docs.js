// Lists the operations of openapi.json. Texts are set as text, never as HTML.
const paths = document.getElementById("paths"), loading = document.getElementById("loading");

function add(parent, tag, text) {
  const element = document.createElement(tag);
  element.textContent = text;
  parent.append(element);
  return element;
}

function show(method, path, operation, parameters) {
  add(add(paths, "h2", ""), "code", `${method.toUpperCase()} ${path}`);
  add(paths, "p", operation.summary);
  for (const parameter of parameters) {
    const choices = parameter.schema?.enum ? `: ${parameter.schema.enum.join(", ")}` : "";
    add(paths, "p", `${parameter.in} ${parameter.name}${choices} ${parameter.description ?? ""}`);
  }
  for (const [type, content] of Object.entries(operation.requestBody?.content ?? {})) {
    const details = add(paths, "details", "");
    add(details, "summary", `body: ${type}`);
    add(details, "pre", JSON.stringify(content.schema, null, 1));
  }
}

try {
  const answer = await fetch("openapi.json");
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  const description = await answer.json();
  document.getElementById("title").textContent = description.info.title;
  document.title = description.info.title;
  loading.hidden = true;
  for (const [path, item] of Object.entries(description.paths)) {
    for (const [method, operation] of Object.entries(item)) {
      if (method !== "parameters") show(method, path, operation, [...(item.parameters ?? []), ...(operation.parameters ?? [])]);
    }
  }
} catch (error) {
  loading.hidden = false;
  loading.textContent = `openapi.json cannot be read: ${error.message}`;
}
