// Returns what a reader of the page in sight would call a fault, as a list of texts: text that is clipped, pale or
// outside the page. It is one expression, which a test evaluates in a browser.
(() => {
  const faults = [];
  const name = (node) => `${node.tagName.toLowerCase()}${node.id ? `#${node.id}` : ""} "${node.textContent.trim().slice(0, 40)}"`;
  const root = document.documentElement;
  if (root.scrollWidth > innerWidth) faults.push(`the page is ${root.scrollWidth} px wide, its window ${innerWidth}`);

  // Labels of figures lie within their figure.
  const isShown = (node) => node.getClientRects().length > 0 && getComputedStyle(node).visibility !== "hidden";
  for (const svg of document.querySelectorAll(".plot svg")) {
    if (!isShown(svg)) continue;
    const frame = svg.viewBox.baseVal, toFrame = svg.getScreenCTM().inverse();
    for (const text of svg.querySelectorAll("text")) {
      const box = text.getBBox(), place = toFrame.multiply(text.getScreenCTM());
      const corners = [[box.x, box.y], [box.x + box.width, box.y], [box.x, box.y + box.height], [box.x + box.width, box.y + box.height]];
      for (const [x, y] of corners) {
        const point = new DOMPoint(x, y).matrixTransform(place), slack = 1;
        if (point.x < frame.x - slack || point.x > frame.x + frame.width + slack || point.y < frame.y - slack || point.y > frame.y + frame.height + slack) {
          faults.push(`clipped: ${name(text)} of ${svg.closest("figure, body").id}`);
          break;
        }
      }
      const size = parseFloat(getComputedStyle(text).fontSize) * svg.getScreenCTM().a;
      if (size < 8.5) faults.push(`small: ${name(text)} of ${svg.closest("figure, body").id}, ${size.toFixed(1)} px`);
    }
  }

  // Text has a contrast of 4.5 with its background. A canvas turns any color into its parts.
  const pen = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
  const parts = new Map();
  const parse = (color) => {
    if (!parts.has(color)) {
      pen.clearRect(0, 0, 1, 1);
      pen.fillStyle = color;
      pen.fillRect(0, 0, 1, 1);
      parts.set(color, [...pen.getImageData(0, 0, 1, 1).data].map((value) => value / 255));
    }
    return parts.get(color);
  };
  const over = ([r, g, b, a], under) => [r, g, b].map((value, at) => a * value + (1 - a) * under[at]);
  const luminance = (color) => color.map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, at) => sum + value * [0.2126, 0.7152, 0.0722][at], 0);
  const backgroundOf = (node) => (node ? over(parse(getComputedStyle(node).backgroundColor), backgroundOf(node.parentElement)) : [1, 1, 1]);
  const seen = new Set();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || seen.has(node) || !isShown(node) || node.closest(":disabled, script, style, noscript, option, title")) continue;
    seen.add(node);
    const style = getComputedStyle(node), background = backgroundOf(node);
    const color = over(parse(node.closest("svg") ? style.fill : style.color), background);
    const [low, high] = [luminance(color), luminance(background)].sort((a, b) => a - b);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < 4.5) faults.push(`pale: ${name(node)} has a contrast of ${contrast.toFixed(2)}`);
  }
  return faults;
})()
