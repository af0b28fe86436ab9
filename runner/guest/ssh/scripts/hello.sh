look
tell
