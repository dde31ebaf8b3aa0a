"""The /commands of the chat, grouped by subject, and the table of all."""
