"""A headless Chromium for the tests of the app, and what they ask of a page."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service


FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--disable-default-apps",
    "--lang=en",
]


def programs() -> tuple[str | None, str | None]:
    """Chromium and its driver, where they are installed."""
    return shutil.which("chromium"), shutil.which("chromedriver")


def open_browser(profile: Path) -> webdriver.Chrome:
    """A browser with an empty profile that writes down every request."""
    chromium, driver = programs()
    assert chromium and driver
    options = Options()
    options.binary_location = chromium
    for flag in [*FLAGS, f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    return webdriver.Chrome(options=options, service=Service(driver))  # a named driver: selenium fetches none


def resize(browser: webdriver.Chrome, width: int, height: int, dark: bool = False) -> None:
    """Give the page this size (a window cannot be as narrow as a phone) and this colour scheme."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def take_screenshot(browser: webdriver.Chrome, path: Path) -> None:
    """The whole page, not only the part that is scrolled to."""
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True})
    path.write_bytes(base64.b64decode(shot["data"]))


def requested_hosts(browser: webdriver.Chrome) -> set[str | None]:
    """The hosts of all requests and sockets since the last call that go to a network (`data:` and so on do not)."""
    addresses = []
    for entry in browser.get_log("performance"):
        message: dict[str, Any] = json.loads(entry["message"])["message"]
        parameters = message["params"]
        if message["method"] == "Network.requestWillBeSent":
            addresses.append(urlsplit(parameters["request"]["url"]))
        if message["method"] == "Network.webSocketCreated":
            addresses.append(urlsplit(parameters["url"]))
    return {address.hostname for address in addresses if address.scheme in ("http", "https", "ws", "wss")}


# WCAG 2.2, success criterion 1.4.3: 4.5 to 1 for text; 3 to 1 for text of 24 px, or of 18.66 px if bold
FAINT_TEXT = """
const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const parse = text => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
};
const over = (top, under) => top.slice(0, 3).map((c, i) => c * top[3] + under[i] * (1 - top[3]));
const ground = element => {
    if (!element) return [255, 255, 255];
    const own = parse(getComputedStyle(element).backgroundColor);
    return own[3] === 1 ? own.slice(0, 3) : over(own, ground(element.parentElement));
};
const faint = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
    if (!text || !element.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    if (["SCRIPT", "STYLE"].includes(element.tagName) || element.disabled) continue;
    const style = getComputedStyle(element), behind = ground(element);
    const [a, b] = [luminance(over(parse(style.color), behind)), luminance(behind)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), size = parseFloat(style.fontSize);
    const needed = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
    if (ratio < needed) faint.push(`${ratio.toFixed(2)} ${style.color} on ${behind}: ${text}`);
}
return faint;
"""

# What can be reached with the Tab key, and what a screen reader calls it
NAMES_OF_CONTROLS = """
const selector = "a[href], button, input, textarea, select, summary, [tabindex]:not([tabindex='-1'])";
return [...document.querySelectorAll(selector)].filter(e => e.checkVisibility() && !e.disabled).map(e => {
    const label = e.labels && e.labels.length ? e.labels[0].innerText : "";
    return [e.tagName, (e.getAttribute("aria-label") || label || e.innerText || "").trim()];
});
"""
