"""The gateway's page in Chromium: `try URL` uses it and prints what it shows; `pictures URL FOLDER` takes screenshots.

Nothing here runs scripts in the page, because its Content-Security-Policy forbids that.
"""

import json
import re
import shutil
import sys

from playwright.sync_api import Page, sync_playwright

HOSTILE = '<img src="x" onerror="document.title=1">'
QUESTION = "What is rain?"
DONE = "Done"


def send(page: Page, panel: str, done: str = DONE, **fields: str) -> None:
    """Fill a form, send it, and wait for its end."""
    for name, value in fields.items():
        page.fill(f"#{panel} [name={name}]", value)
    page.click(f"#{panel} [name=send]")
    page.locator(f"#{panel} form :is(.status, .error)", has_text=done).wait_for()


def texts(page: Page, selector: str) -> list[str]:
    return page.locator(selector).all_text_contents()


def rows(page: Page, selector: str) -> list[list[str]]:
    return [row.locator("th, td").all_text_contents() for row in page.locator(f"{selector} tbody tr").all()]


def use(page: Page, url: str) -> dict:
    """What the page shows of each task."""
    hosts: set[str] = set()
    wrong: list[str] = []
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(url)
    page.locator("#connection", has_text="model").wait_for()
    found: dict = {"choices": texts(page, "#chat [name=model] option")}
    page.select_option("#chat [name=model]", "talk")
    send(page, "chat", "The answer is complete", message=HOSTILE, max_tokens="8")
    send(page, "chat", "The answer is complete", message="And then?")
    found["log"] = texts(page, "#chat .log .text")
    found["images"] = page.locator("img").count()
    page.click("#chat [name=new]")
    page.fill("#chat [name=schema]", json.dumps({"enum": ["rain", "snow"]}))
    send(page, "chat", "The answer is complete", message="Which?")
    found["structured"], found["about"] = texts(page, "#chat .log .text")[-1], texts(page, "#chat .log .about")[-1]
    page.fill("#chat [name=schema]", "{")
    send(page, "chat", "The schema is no JSON", message="Which?")
    page.fill("#chat [name=schema]", "")
    page.click("#chat [name=new]")
    page.fill("#chat [name=max_tokens]", "1900")
    page.fill("#chat [name=message]", "Go on.")
    page.press("#chat [name=message]", "Enter")
    page.locator("#chat .message.assistant .text", has_text=re.compile(r".{5}", re.DOTALL)).wait_for()
    found["busy"] = page.get_attribute("#chat .log", "aria-busy")
    page.press("#chat [name=message]", "Escape")
    page.locator("#chat .status", has_text="Stopped.").wait_for()
    found["stopped"] = texts(page, "#chat .log .about")[-1]
    page.focus("#tab-chat")
    page.keyboard.press("ArrowRight")
    found["focused"] = page.locator("[role=tab]:focus").get_attribute("id")
    send(page, "embed", texts="a cat\n\nThe dog lay under the tree.\nrain")
    found["cosines"] = rows(page, "#embed .heat")
    page.click("#tab-rank")
    send(page, "rank", query="rain", texts="a cat\nThe dog lay under the tree.\nrain")
    found["ranked"] = rows(page, "#rank table")
    page.click("#tab-translate")
    send(page, "translate", text=HOSTILE, target_lang="French")
    found["translated"] = page.text_content("#translate .result")
    page.click("#tab-entities")
    send(page, "entities", text="🌧 Ada met Charles in Zürich.")
    found["entities"] = rows(page, "#entities table")
    found["marked"] = texts(page, "#entities mark")
    page.click("#tab-metrics")
    page.locator("#metrics table").first.locator("tbody tr").nth(4).wait_for()
    found["metrics"] = rows(page, "#metrics table:first-child")
    return found | {"hosts": sorted(hosts), "wrong": wrong, "title": page.title()}


def pictures(page: Page, url: str, folder: str) -> dict:
    """Screenshots, of the light and the dark form."""
    page.goto(url)
    page.locator("#connection", has_text="model").wait_for()
    page.select_option("#chat [name=model]", "smollm2")
    send(page, "chat", "The answer is complete", message=QUESTION, max_tokens="120")
    page.screenshot(path=f"{folder}/page-chat.png")
    page.emulate_media(color_scheme="dark")
    page.click("#tab-embed")
    send(page, "embed")
    page.screenshot(path=f"{folder}/page-embeddings.png")
    return {"answer": texts(page, "#chat .log .text")[-1]}


if __name__ == "__main__":
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        page = browser.new_page(viewport={"width": 1100, "height": 760}, color_scheme="light")
        page.set_default_timeout(60_000)
        work = {"try": use, "pictures": pictures}[sys.argv[1]]
        print(json.dumps(work(page, *sys.argv[2:])))
        browser.close()
