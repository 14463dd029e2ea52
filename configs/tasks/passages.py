"""Passages of about 150 words out of WikiText pages, so that a few hundred documents are minutes of work."""

WORDS = 150


def passages(pages):
    """Returns a data set of passages: whole paragraphs of a page, joined until they have `WORDS` words."""

    def cut(batch):
        texts = []
        for page in batch["page"]:
            text = ""
            for paragraph in page.split("\n"):
                if paragraph.strip() and not paragraph.strip().startswith("="):
                    text += paragraph.strip() + "\n"
                if len(text.split()) >= WORDS:
                    texts.append(text)
                    text = ""
        return {"text": texts}

    return pages.map(cut, batched=True, remove_columns=pages.column_names)
