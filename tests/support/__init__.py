"""What several test files share. There are no tests in here."""
