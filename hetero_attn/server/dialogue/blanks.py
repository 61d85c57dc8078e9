"""Blanks around what was said: at the very begin and between calls they are nothing, inside they are text."""


class Blanks:
    """Holds blanks back until something follows. left: those that are held. is_new: whether nothing was said yet."""

    def __init__(self) -> None:
        self.left, self.is_new = "", True

    def without(self, text: str, is_first: bool) -> str:
        """What is certain to be followed by something, or to be something; is_first: blanks before it are nothing."""
        text = self.left + text
        if is_first:
            text = text.lstrip()
        certain = text.rstrip()
        self.left = text[len(certain) :]
        self.is_new &= not certain
        return certain
