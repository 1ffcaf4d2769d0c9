"""Whether a model's text is here what another library makes of it: `onecopy check`.

The files `*_text.py` are programs for the reference's own interpreter, which need nothing of ours.
"""
