"""Text from elsewhere: resumable downloads, and Common Crawl's pages to stories."""
