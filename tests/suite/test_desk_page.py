"""The desk's page as a writer meets it: a real browser that types and presses buttons."""

import desk_page
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(desk_page.missing()),
                                                   reason=f"needs {', '.join(desk_page.missing())}")]
EVIL = ("<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\"> 🪁 שלום <|endoftext|> "
        "ran.")
# The least contrast of text and background (WCAG: 4.5 for text). A transparent background shows the one behind.
CONTRAST = """() => {
  const over = (color, back) => {
    const [r, g, b, opaque = 1] = color.match(/[\\d.]+/g).map(Number)
    return [r, g, b].map((c, i) => opaque * c + (1 - opaque) * back[i])
  }
  const behind = e => e ? over(getComputedStyle(e).backgroundColor, behind(e.parentElement)) : [255, 255, 255]
  const light = color => color.map(c => ((c / 255 + 0.055) / 1.055) ** 2.4)
                              .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0.05)
  const ratio = e => {
    const back = behind(e), two = [light(over(getComputedStyle(e).color, back)), light(back)]
    return Math.max(...two) / Math.min(...two)
  }
  return Math.min(...[...document.querySelectorAll("textarea, input, h2, .desk *, .widget-label")].map(ratio))
}"""


@pytest.fixture(scope="module")
def address(two_runs, token_files):
    """Where nearly all words are marked: an untrained pair knows no facts."""
    with desk_page.served(*two_runs, "--tokens", token_files["val"].parent, "--false-alarms", 100) as address:
        yield address


@pytest.fixture(scope="module")
def chromium():
    with desk_page.browser() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def page(chromium, address):
    return desk_page.opened(chromium, address)


def looks_right(page):
    """Whether the page fits its window, can be read, and shows no error of the kernel."""
    fits = page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    return fits and page.evaluate(CONTRAST) >= 4.5 and not page.locator("[data-mime-type*=std]").count()


def test_a_writer_types_writes_stops_and_checks(page):
    """Guards: a page that does not load; texts that come only at the end; a stop that does not reach the thread."""
    page.locator(".noUi-handle").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.get_by_label("prompt").fill("Once upon a time there was a shy boy named Tom.")
    page.get_by_label("tokens").fill("2000")
    page.get_by_role("button", name="Write").press("Enter")
    page.wait_for_function("document.querySelectorAll('.side').length == 3")
    lengths = [len(text) for text in page.locator(".side").all_inner_texts()]
    page.wait_for_function("lengths => [...document.querySelectorAll('.side')].every((side, i) => "
                           "side.innerText.length > lengths[i])", arg=lengths)
    assert "Stopped." in desk_page.press(page, "Stop")
    assert "blend, 53 % logic" in page.locator(".side").all_inner_texts()[1] and looks_right(page)
    page.get_by_label("story").fill("Once there was a girl named Lily. Lily had a little dog.")
    page.get_by_label("draft").fill("Soon the little cat danced.")
    assert "words do not fit the story" in desk_page.press(page, "Check")
    assert set(page.locator("mark").all_inner_texts()) <= {"Soon", "the", "little", "cat", "danced."}
    assert page.locator("mark").count() and looks_right(page)


def test_a_second_tab_on_a_phone_takes_any_text(page, chromium, address):
    """Guards: a button that hangs, a stack trace, text that becomes part of the page; a scroll bar, dark on dark."""
    first, page = page, desk_page.opened(chromium, address, 390, "dark")
    colors = [tab.evaluate("getComputedStyle(document.body).backgroundColor") for tab in (first, page)]
    assert colors == ["rgb(255, 255, 255)", "rgb(17, 17, 17)"] and looks_right(page)
    title, shown = page.title(), []
    for prompt, message in ((" ", "The prompt is empty"), ("a" * 2**20, "The prompt has 1,048,576 char"), (EVIL, EVIL)):
        page.get_by_label("prompt").fill(prompt)
        assert message in desk_page.press(page, "Write")
    for story, draft, message in (("", "x", "The story is empty"), ("Kim ran.", " \n", "The draft is empty"),
                                  ("Kim ran.", "a " * 2**19, "The draft has 1,048,576 char"), (EVIL, EVIL, "words")):
        page.get_by_label("story").fill(story)
        page.get_by_label("draft").fill(draft)
        shown.append(desk_page.press(page, "Check"))
        assert message in shown[-1]
    assert EVIL in page.locator(".desk .side").last.inner_text() and page.title() == title and looks_right(page)
    assert "Traceback" not in "".join(shown)
    first.get_by_label("tokens").fill("5")
    shown = desk_page.press(first, "Write")
    assert "% logic" in shown and "Stopped." not in shown
