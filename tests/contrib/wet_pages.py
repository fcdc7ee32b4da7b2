"""WET files with pages of every kind, made by warcio."""

import io
import random
import warnings

WORDS = {
    "en": ("the a little old house river garden teacher mountain walked through into with found bright window morning "
           "children where their before because should never always remember something quietly between").split(),
    "de": ("der die das kleine alte Haus Fluss Garten Lehrer Berg ging durch hinein mit fand helles Fenster Morgen "
           "Kinder wo ihre bevor weil sollte niemals immer erinnern etwas leise zwischen und nicht").split(),
    "es": ("el la los pequeño vieja casa río jardín maestro montaña caminaba por dentro con encontró ventana mañana "
           "niños donde antes porque debería nunca siempre recordar algo entre también muy después").split(),
}


def prose(rng, language, n_words=120):
    """A page of lines of ten made-up words: no phrase of five repeats by chance."""
    words = [rng.choice(WORDS[language]) for _ in range(n_words)]
    return "\n".join(" ".join(words[i:i + 10]).capitalize() + "." for i in range(0, n_words, 10))


def pages(n, seed=0):
    """(page, what becomes of it) with English wished for: of each kind in turn."""
    rng, made = random.Random(seed), []
    for i in range(n):
        page = prose(rng, "en")
        kind = i % 12
        made.append([
            (page, "kept"), (page, "kept"), (page, "kept"),
            (prose(rng, "de"), "language"), (prose(rng, "es"), "language"),
            (prose(rng, "en", 30), "short"), ("\n".join([page.split("\n")[0]] * 12), "repeated_lines"),
            (" ".join(["buy cheap"] * 100 + page.split()), "frequent_ngram"),
            (page + " " + page.replace("\n", " "), "repeated_ngrams"),
            (page + "\n<|endoftext|>\n" + page, "separator"), (page + "\ufffd", "undecoded"),
            (" ".join(str(rng.randrange(10**6)) for _ in range(80)), "few_letters")][kind])
        if i % 24 == 23:  # a normalised copy of an earlier page, perhaps of another file
            made[-1] = (made[rng.randrange(0, i, 12)][0].upper().replace(".", " !"), "duplicate")
    return made


def write_wet(path, texts, packed=True, kind="conversion"):
    """Write pages as Common Crawl does: a warcinfo record, then one conversion record each."""
    from warcio import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    http = {"http_headers": StatusAndHeaders("200 OK", [], protocol="HTTP/1.0")} if kind == "response" else {}
    with path.open("wb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # warcio's writer leaves its buffers to the garbage collector
        writer = WARCWriter(file, gzip=packed)
        writer.write_record(writer.create_warcinfo_record(path.name, {"isPartOf": "TEST"}))
        for i, text in enumerate(texts):
            writer.write_record(writer.create_warc_record(
                f"https://example.org/{i}", kind, payload=io.BytesIO(text.encode()),
                warc_content_type="text/plain", **http))
    return path
