"""The terminal chat: a prompt at the bottom of the terminal's native scrollback.

app        a conversation: the model, the session, answers
loop       the loop: read, answer, repeat
commands   the /commands
prompt     reads the user's input
view       prints the header, notes, and statistics below an answer
stream     prints an answer while it is generated, without redrawing finished rows
markdown   one line of Markdown -> styled text
session    the conversation, saved continuously
"""
