"use strict";
// Turns the middle slices of every mode, one below the other, into one viewer with a
// slider per plane. All pictures are in the page.
(() => {
  const data = JSON.parse(document.getElementById("slices").textContent);
  const sections = [...document.querySelectorAll(".mode")];
  const viewer = sections[0];
  sections.slice(1).forEach((section) => section.remove());
  const title = viewer.querySelector("h3");
  const legend = viewer.querySelector("p");
  const place = { ...data.middle };
  let mode = 0;
  let gray = 0;

  const figures = [...viewer.querySelectorAll("figure")].map((figure) => {
    const plane = figure.dataset.plane;
    const slider = document.createElement("input");
    slider.type = "range";
    slider.min = 0;
    slider.max = data.index[plane].length - 1;
    slider.value = place[plane];
    slider.setAttribute("aria-label", plane + " slice");
    slider.addEventListener("input", () => {
      place[plane] = Number(slider.value);
      show();
    });
    const frame = figure.querySelector(".frame");
    frame.after(slider);
    frame.addEventListener("wheel", (event) => {
      event.preventDefault();
      slider.value = Number(slider.value) + Math.sign(event.deltaY);
      slider.dispatchEvent(new Event("input"));
    }, { passive: false });
    return { plane, slider, image: frame.querySelector("img"), number: figure.querySelector("output") };
  });

  // A row of buttons, one of which is pressed.
  function row(kind, label, titles, key, choose) {
    const bar = document.createElement("div");
    bar.className = "modes " + kind;
    bar.setAttribute("role", "group");
    bar.setAttribute("aria-label", label);
    const buttons = titles.map((text, i) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = text;
      button.title = "key " + key(i);
      button.addEventListener("click", () => choose(i));
      bar.append(button);
      return button;
    });
    return { bar, buttons };
  }
  const modes = row("pictures", "What is shown", data.modes.map((one) => one.title), (i) => i + 1, choose);
  const windows = row("windows", "Window", data.windows.map((text) => text + " window"), () => "w", chooseWindow);
  title.before(modes.bar);
  if (data.windows.length > 1) title.before(windows.bar);
  title.hidden = true;

  function choose(i) {
    mode = i;
    show();
  }

  function chooseWindow(i) {
    gray = i;
    show();
  }

  function show() {
    const one = data.modes[mode];
    legend.textContent = one.legend;
    const png = one.png[gray] ?? one.png[0]; // grid and Jacobian know one window
    modes.buttons.forEach((button, i) => button.setAttribute("aria-pressed", i === mode));
    windows.buttons.forEach((button, i) => {
      button.setAttribute("aria-pressed", png === one.png[i]);
      button.disabled = i >= one.png.length;
    });
    for (const { plane, image, number } of figures) {
      const i = place[plane];
      image.src = "data:image/png;base64," + png[plane][i];
      image.alt = one.title + ", " + plane;
      number.textContent = data.index[plane][i] + 1 + " of " + data.count[plane];
    }
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const i = "123456789".indexOf(event.key);
    if (i >= 0 && i < modes.buttons.length) choose(i);
    if (event.key === "w") chooseWindow((gray + 1) % data.windows.length);
  });
  show();
})();
