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

  const bar = document.createElement("div");
  bar.className = "modes";
  bar.setAttribute("role", "group");
  bar.setAttribute("aria-label", "What is shown");
  const buttons = data.modes.map((one, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = one.title;
    button.title = "key " + (i + 1);
    button.addEventListener("click", () => choose(i));
    bar.append(button);
    return button;
  });
  viewer.prepend(bar);
  title.hidden = true;

  function choose(i) {
    mode = i;
    show();
  }

  function show() {
    const one = data.modes[mode];
    legend.textContent = one.legend;
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", i === mode));
    for (const { plane, image, number } of figures) {
      const i = place[plane];
      image.src = "data:image/png;base64," + one.png[plane][i];
      image.alt = one.title + ", " + plane;
      number.textContent = data.index[plane][i] + 1 + " of " + data.count[plane];
    }
  }

  document.addEventListener("keydown", (event) => {
    const i = "123456789".indexOf(event.key);
    if (i >= 0 && i < buttons.length && !event.ctrlKey && !event.metaKey && !event.altKey) {
      choose(i);
    }
  });
  show();
})();
