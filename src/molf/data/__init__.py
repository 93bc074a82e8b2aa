"""Records, chats and their tokens."""
