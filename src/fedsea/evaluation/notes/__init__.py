"""Generated notes with planted identifiers, and how many of them the pseudonyms' recogniser finds.

writer.py     notes of made-up people: sentences of templates.py filled by identifiers.py, with the place of each plant
templates.py  sentences in German and English, and ones without any identifier
identifiers.py  made-up identifiers of every type, in many forms
recall.py     recall and precision
"""
