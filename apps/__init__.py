"""What people run: the command line, the chat, the demo model's making."""
