"""Text: tokenizer, streamed text, chat templates."""
