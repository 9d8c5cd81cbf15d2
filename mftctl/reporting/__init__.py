"""Reports made from run folders: tables, figures and pages."""
