"""The chat in the terminal: a prompt that stays at the bottom of a native scrollback.

app        one conversation with a person: read, answer, again
commands   what /words do
prompt     reading what a person types
view       the header, the notes, the line of numbers under an answer
stream     showing an answer while it is written, without ever redrawing what is finished
markdown   one line of Markdown -> styled text
session    the conversation, on disk as it goes
"""
