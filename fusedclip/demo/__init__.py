"""``fusedclip demo``: one small language model, trained without clipping, with torch's, with ours.

``language_model`` is the model and its text, ``training`` what ``fusedclip.compare`` runs an arm.
"""
